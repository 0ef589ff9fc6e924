# trtkit on a release of TensorRT-LLM without engines (PyTorch backend only). Build from the repository's root:
#   docker build --file docker/pytorch.Dockerfile --tag trtkit:trtllm-pytorch .
# For a newer release: --build-arg TENSORRT_LLM_PYTORCH_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:<tag>
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG TENSORRT_LLM_PYTORCH_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc26

FROM ${PYTHON_IMAGE} AS wheel
ARG HATCHLING_VERSION=1.33.0
RUN python -m pip install --no-cache-dir "hatchling==${HATCHLING_VERSION}"
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${TENSORRT_LLM_PYTORCH_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=wheel /wheels /tmp/wheels
# What the image already has stays as it is: torch there is NVIDIA's own build.
RUN python3 -m pip list --format=freeze > /tmp/image.txt \
    && wheel="$(echo /tmp/wheels/trtkit-*.whl)" \
    && python3 -m pip install --no-cache-dir --constraint /tmp/image.txt "${wheel}[eval,report]" \
    && rm -rf /tmp/wheels /tmp/image.txt \
    && useradd --create-home --uid 10001 --user-group trtkit \
    && install --directory --owner=trtkit --group=trtkit /models /builds /results

USER 10001:10001
WORKDIR /home/trtkit
ENV HF_HOME=/models/hub
VOLUME ["/models", "/builds", "/results"]
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=1 CMD ["trtkit", "--version"]
ENTRYPOINT ["trtkit"]
CMD ["--help"]
