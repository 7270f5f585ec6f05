#!/bin/sh
# Compare the vision graph with what PyTorch made of the same pictures.
# Needs Polygraphy and NumPy; onnxrt needs onnxruntime, trt needs TensorRT and its GPU.
#   ./run.sh onnxrt [model.onnx]
#   ./run.sh trt    [model.onnx]
# Exit code 0: all outputs agree; 1: one does not.
set -eu
engine=${1:-onnxrt}
cd "$(dirname "$0")"
model=${2:-model.onnx}
case "$engine" in
  onnxrt) set -- --onnxrt ;;
  trt) set -- --trt --strongly-typed @SHAPES@ ;;
  *) echo "usage: $0 onnxrt|trt [model.onnx]" >&2; exit 2 ;;
esac
exec polygraphy run "$model" "$@" \
  --data-loader-script load_data.py \
  --load-outputs golden.json \
  --compare-func-script compare_outputs.py
