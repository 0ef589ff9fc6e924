# trtkit with the embedded engine alone: no GPU, no TensorRT-LLM. Build from the repository's root:
#   docker build --file docker/cpu.Dockerfile --tag trtkit:cpu .
ARG PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254

FROM ${PYTHON_IMAGE} AS build
ARG HATCHLING_VERSION=1.33.0
RUN python -m venv /opt/trtkit && /opt/trtkit/bin/pip install --no-cache-dir "hatchling==${HATCHLING_VERSION}"
WORKDIR /src
COPY constraints.txt .
# torch first and from its CPU index: from elsewhere it brings gigabytes of CUDA.
RUN /opt/trtkit/bin/pip install --no-cache-dir --constraint constraints.txt \
    --index-url https://download.pytorch.org/whl/cpu torch
COPY . .
RUN /opt/trtkit/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && wheel="$(echo /wheels/trtkit-*.whl)" \
    && /opt/trtkit/bin/pip install --no-cache-dir --constraint constraints.txt "${wheel}[eval,report]" \
    && /opt/trtkit/bin/pip uninstall --yes hatchling

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/trtkit /opt/trtkit
RUN useradd --create-home --uid 10001 --user-group trtkit \
    && install --directory --owner=trtkit --group=trtkit /models /builds /results

USER 10001:10001
WORKDIR /home/trtkit
ENV PATH=/opt/trtkit/bin:$PATH HF_HOME=/models/hub
VOLUME ["/models", "/builds", "/results"]
HEALTHCHECK --interval=5m --timeout=1m --start-period=30s --retries=1 CMD ["trtkit", "doctor", "--require", "embedded"]
ENTRYPOINT ["trtkit"]
CMD ["--help"]
