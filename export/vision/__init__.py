"""Export the vision graph: tower, reducer and projector as one module, to ONNX."""
