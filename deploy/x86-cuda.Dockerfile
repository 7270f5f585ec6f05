# Foveate on an x86-64 machine with an NVIDIA GPU: TensorRT, ONNX Runtime on CUDA, llama.cpp.
#
#     docker build -f deploy/x86-cuda.Dockerfile -t foveate:cuda .
#     docker run --gpus all --rm -it -v ~/bundles:/bundles -v foveate-key:/key \
#         foveate:cuda doctor /bundles/rover
ARG BASE=nvcr.io/nvidia/cuda:13.2.0-devel-ubuntu24.04
FROM ${BASE}
ARG ARCHITECTURES=all-major

RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential cmake git python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/foveate
ENV PATH=/opt/foveate/bin:/usr/local/cuda/bin:${PATH}

# GGML_NATIVE is off, so that the image runs on other processors than the one that built it.
ENV CUDACXX=/usr/local/cuda/bin/nvcc
RUN CMAKE_ARGS="-DGGML_CUDA=on -DGGML_NATIVE=off -DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES}" \
    pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36

COPY . /src
RUN pip install --no-cache-dir "/src[cuda,tensorrt,constrained,metrics,video]"

ENV FOVEATE_PLAN_KEY=/key/plan.key
VOLUME ["/key"]
ENTRYPOINT ["foveate"]
CMD ["doctor"]
