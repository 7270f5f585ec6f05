"""Make the vision graph: tower, reducer and projector as one module, exported to ONNX."""
