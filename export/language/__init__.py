"""Export the language model: an ONNX decoder, a GGUF file, or a directory for a server."""
