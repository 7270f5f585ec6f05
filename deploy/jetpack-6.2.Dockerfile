# Foveate on JetPack 6.2 (Jetson Linux 36.4, CUDA 12.6, TensorRT 10.3, Python 3.10).
#
#     docker build -f deploy/jetpack-6.2.Dockerfile -t foveate:jp6.2 .
#     docker run --runtime nvidia --rm -it -v ~/bundles:/bundles -v foveate-key:/key \
#         foveate:jp6.2 doctor /bundles/rover
#
# TensorRT and its Python bindings are the image's own, so the environment sees its packages.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential cmake git python3-dev python3-libnvinfer python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/foveate
ENV PATH=/opt/foveate/bin:/usr/local/cuda/bin:${PATH}

# llama.cpp for Orin's GPU (compute capability 8.7).
ENV CUDACXX=/usr/local/cuda/bin/nvcc
RUN CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=87" \
    pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36

# No extra `cpu` or `cuda`: PyPI's onnxruntime has no CUDA for a Jetson. NVIDIA's wheel, where
# ONNX Runtime is to use the GPU:
#     pip install onnxruntime-gpu --index-url https://pypi.jetson-ai-lab.io/jp6/cu126
# numpy stays below 2 for ROS 2 Humble's cv_bridge.
COPY . /src
RUN pip install --no-cache-dir "numpy<2" "/src[tensorrt,constrained,metrics,video]"

# The key that plans are signed with: on a volume, or each container has a key of its own.
ENV FOVEATE_PLAN_KEY=/key/plan.key
VOLUME ["/key"]
ENTRYPOINT ["foveate"]
CMD ["doctor"]
