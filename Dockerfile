# One image runs every stage and every worker.
#   docker build --build-arg GIT_COMMIT=$(git rev-parse HEAD) -t dinopipe:0.1.0 .
# The torch wheel brings its CUDA libraries: the same image runs on CPUs and on NVIDIA GPUs.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/dinopipe
COPY pyproject.toml README.md LICENSE ./
COPY components components
COPY dinov2_core dinov2_core
COPY k8s k8s
COPY pipelines pipelines
RUN /opt/dinopipe/bin/pip install torch==2.14.1 torchvision==0.29.1 \
    && /opt/dinopipe/bin/pip install .

FROM ${BASE}
ARG GIT_COMMIT=""
LABEL org.opencontainers.image.title="dinopipe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/opt/dinopipe/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    MLFLOW_DISABLE_TELEMETRY=true \
    DINOPIPE_GIT_COMMIT=${GIT_COMMIT}
COPY --from=build /opt/dinopipe /opt/dinopipe
RUN python3 -c "import torch, faiss, mlflow, components.runtime.stage, dinov2_core.training.loop"
USER 10001:10001
WORKDIR /tmp
CMD ["dinopipe", "--help"]
