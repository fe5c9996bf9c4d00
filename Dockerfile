# One image runs every stage and every training pod.
#   docker build --build-arg GIT_COMMIT=$(git rev-parse HEAD) -t dinopipe:0.1.0 .
#   docker build --build-arg VARIANT=cpu -t dinopipe:0.1.0-cpu .        without GPUs, 5 GB smaller
# A base is any Debian or Ubuntu image with Python 3.11 or 3.12, or with apt-get to install it. The
# one for GPUs adds NVIDIA's environment; the CUDA libraries come with torch from PyPI. CPU_WHEELS
# is the index of a torch without them; empty, where it is out of reach, takes PyPI's there too.
ARG VARIANT=cuda
ARG CPU_BASE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG CUDA_BASE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1

FROM ${CPU_BASE} AS base-cpu

FROM ${CUDA_BASE} AS base-cuda

FROM base-${VARIANT} AS python
RUN python3 -c "import ensurepip, ssl, sys; assert sys.version_info >= (3, 11)" 2>/dev/null \
    || { apt-get update \
         && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
         && rm -rf /var/lib/apt/lists/*; }

# A stage of its own: what is installed below stays while these lines do.
FROM python AS requirements
COPY pyproject.toml ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /requirements.txt

FROM python AS libraries
ARG VARIANT
ARG CPU_WHEELS=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/dinopipe/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY --from=requirements /requirements.txt /opt/dinopipe/
COPY .ci/constraints.txt /opt/dinopipe/
RUN if [ "$VARIANT" = cpu ]; then index=$CPU_WHEELS; fi \
    && python3 -m venv /opt/dinopipe \
    && pip install ${index:+--index-url "$index"} -c /opt/dinopipe/constraints.txt torch torchvision \
    && pip install -c /opt/dinopipe/constraints.txt -r /opt/dinopipe/requirements.txt

FROM libraries AS package
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY components components
COPY dinov2_core dinov2_core
COPY k8s k8s
COPY pipelines pipelines
RUN pip wheel --no-deps --wheel-dir /wheels .

# On top of the libraries, so that another version of ours is a layer of one megabyte.
FROM libraries
COPY --from=package /wheels /opt/dinopipe/wheels
RUN pip install --no-deps /opt/dinopipe/wheels/*.whl && pip check \
    && echo "dinopipe:x:10001:10001::/tmp:/usr/sbin/nologin" >> /etc/passwd \
    && echo "dinopipe:x:10001:" >> /etc/group
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=dinopipe \
    MLFLOW_DISABLE_TELEMETRY=true
USER 10001:10001
WORKDIR /tmp
# The image is good: all modules of a pod import, and what only the shell needs is not there.
RUN python3 -c "import importlib, pkgutil, components, dinov2_core, k8s; [importlib.import_module(module.name) for package in (components, dinov2_core, k8s) for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.') if not module.name.endswith(('.component', '.__main__'))]" \
    && ! python3 -c "import kfp" 2>/dev/null \
    && ! command -v cc gcc g++ clang
ARG GIT_COMMIT=""
ENV DINOPIPE_GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="dinopipe" \
      org.opencontainers.image.description="Stages and training pods of dinopipe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
CMD ["python3", "-m", "components.train", "--help"]
