# Foveate on JetPack 7.2 (Jetson Linux 39.2, CUDA 13.2, TensorRT 10.16, Python 3.12), Orin and Thor.
#
#     docker build -f deploy/jetpack-7.2.Dockerfile -t foveate:jp7.2 .
#     docker run --runtime nvidia --rm -it -v ~/bundles:/bundles -v foveate-key:/key \
#         foveate:jp7.2 doctor /bundles/rover
#
# From 7.2 on a Jetson runs the usual images for Arm servers (SBSA), so this is NVIDIA's CUDA image
# with TensorRT from the same repository. For Thor: --build-arg ARCHITECTURES=110.
ARG BASE=nvcr.io/nvidia/cuda:13.2.0-devel-ubuntu24.04
FROM ${BASE}
ARG ARCHITECTURES=87

RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential cmake git python3-dev python3-libnvinfer python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/foveate
ENV PATH=/opt/foveate/bin:/usr/local/cuda/bin:${PATH}

ENV CUDACXX=/usr/local/cuda/bin/nvcc
RUN CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES}" \
    pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36

# No extra `cpu` or `cuda`: see the file for JetPack 6.2.
COPY . /src
RUN pip install --no-cache-dir "/src[tensorrt,constrained,metrics,video]"

ENV FOVEATE_PLAN_KEY=/key/plan.key
VOLUME ["/key"]
ENTRYPOINT ["foveate"]
CMD ["doctor"]
