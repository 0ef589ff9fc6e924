# syntax=docker/dockerfile:1
# trtkit on a release of TensorRT-LLM without engines (PyTorch backend only). Build from the repository's root:
#   docker build --file docker/pytorch.Dockerfile --tag trtkit:trtllm-pytorch .
# For a newer release: --build-arg TENSORRT_LLM_PYTORCH_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:<tag>
ARG PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254
ARG TENSORRT_LLM_PYTORCH_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc26

FROM ${PYTHON_IMAGE} AS wheel
ARG HATCHLING_VERSION=1.33.0
RUN python -m pip install --no-cache-dir "hatchling==${HATCHLING_VERSION}"
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${TENSORRT_LLM_PYTORCH_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# What the image already has stays as it is: torch there is NVIDIA's own build.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel="$(echo /wheels/trtkit-*.whl)" \
    && python3 -m pip install --no-cache-dir --constraint <(python3 -m pip list --format=freeze) "${wheel}[eval,report]" \
    && useradd --create-home --uid 10001 --user-group trtkit \
    && install --directory --owner=trtkit --group=trtkit /models /builds /results

USER 10001:10001
WORKDIR /home/trtkit
ENV HF_HOME=/models/hub
VOLUME ["/models", "/builds", "/results"]
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=1 CMD ["trtkit", "doctor", "--require", "pytorch"]
ENTRYPOINT ["trtkit"]
CMD ["--help"]
