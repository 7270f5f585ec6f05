"""A vision graph in ONNX: its file, its modules, its float types, and what TensorRT takes."""
