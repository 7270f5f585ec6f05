"""Build TensorRT and TensorRT-RTX plans on the device, and run them."""
