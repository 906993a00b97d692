# SPDX-License-Identifier: Apache-2.0
# The CPU build of vLLM plus this plugin. From the repository's root:
#     docker build -f docker/cpu.Dockerfile -t vllm-kvcompress-cpu .
#     docker run -p 8000:8000 vllm-kvcompress-cpu MODEL --kv-compression bacon --kv-budget 1024
# vLLM's CPU build wants the CPU build of torch, which is on PyTorch's own index of CPU wheels:
#     --build-arg PIP_FLAGS="--extra-index-url ADDRESS"
FROM python:3.12-slim
ARG PIP_FLAGS=""
# for csrc/, and for parts of the model that vLLM compiles when it starts
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY vllm_kvcompress vllm_kvcompress
COPY triton_kernels triton_kernels
COPY csrc csrc
# the second time, torch is there to build csrc/ against
RUN pip install --no-cache-dir ${PIP_FLAGS} ".[cpu]" \
    && pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall . \
    && vllm-kvcompress mend-cpu-env \
    && vllm-kvcompress methods
# not /src, whose triton_kernels/ must not be on the path
WORKDIR /
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
