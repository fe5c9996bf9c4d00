# One image runs every stage and every training pod.
#   docker build --build-arg GIT_COMMIT=$(git rev-parse HEAD) -t dinopipe:0.1.0 .
# BASE: any Debian or Ubuntu image; by digest for a release. For GPUs a CUDA base such as
# nvidia/cuda:13.0.2-base-ubuntu24.04 adds NVIDIA's environment; torch brings the libraries itself.
# TORCH_INDEX: PyTorch's index of CPU wheels makes an image for CPUs only, 5 GB smaller.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS python
RUN python3 -c "import ensurepip, ssl, sys; assert sys.version_info >= (3, 11)" 2>/dev/null \
    || { apt-get update \
         && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
         && rm -rf /var/lib/apt/lists/*; }

# A stage of its own: what is installed below stays while these lines do.
FROM python AS requirements
COPY pyproject.toml ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /requirements.txt

FROM python AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/dinopipe
COPY --from=requirements /requirements.txt ./
RUN /opt/dinopipe/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} $(grep -E '^torch(vision)?==' requirements.txt) \
    && /opt/dinopipe/bin/pip install -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY components components
COPY dinov2_core dinov2_core
COPY k8s k8s
COPY pipelines pipelines
RUN /opt/dinopipe/bin/pip install --no-deps . && /opt/dinopipe/bin/pip check

FROM python
ARG GIT_COMMIT=""
LABEL org.opencontainers.image.title="dinopipe" \
      org.opencontainers.image.description="Stages and training pods of dinopipe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
ENV PATH=/opt/dinopipe/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=dinopipe \
    MLFLOW_DISABLE_TELEMETRY=true \
    DINOPIPE_GIT_COMMIT=${GIT_COMMIT}
COPY --from=build /opt/dinopipe /opt/dinopipe
RUN echo "dinopipe:x:10001:10001::/tmp:/usr/sbin/nologin" >> /etc/passwd \
    && echo "dinopipe:x:10001:" >> /etc/group
USER 10001:10001
WORKDIR /tmp
# The image is good: every program of a pod imports, what only the shell needs is not there.
RUN python3 -c "import components.curate.main, components.train.agent, components.train.launch, components.train.worker, components.evaluate.main, components.register.main, k8s.cluster" \
    && ! python3 -c "import kfp" 2>/dev/null \
    && ! command -v cc gcc g++ clang
CMD ["python3", "-m", "components.train", "--help"]
