"""ONNX graphs: their files, modules, float types, and the operators TensorRT takes (floor 3)."""
