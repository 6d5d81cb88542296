# An image with the command gpt2-pipeline: docs/containers.md.
#   docker build -t gpt2-pipeline .                                 for CPUs
#   docker build -t gpt2-pipeline:cuda --build-arg DEVICE=cuda .    for NVIDIA GPUs
ARG DEVICE=cpu

# torch.compile needs a C++ compiler and the headers of Python.
FROM python:3.12-slim-bookworm AS cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# DeepSpeed compiles its offload optimizer with the CUDA toolkit.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM ${DEVICE}
RUN python3 -m venv /opt/venv
# With --user, the container has no entry for the user. Libraries then find a home and a name in the environment.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=pipeline
WORKDIR /opt/gpt2-pipeline
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[plots]'
WORKDIR /work
ENTRYPOINT ["gpt2-pipeline"]
CMD ["--help"]
