"""The words by which a user says how a language model is run; options and errors share them."""

from typing import Literal

KvCache = Literal["f16", "q8"]
"""How llama.cpp keeps keys and values: 16 bits, or 8.5."""
LlmDevice = Literal["cpu", "cuda"]
"""Where ONNX Runtime computes a decoder."""
SERVERS = ("vllm", "trtllm")
"""Backends that are a server; the first is meant where only an address is given."""
Positions = Literal["compact", "original"]
"""Where visual tokens stand for the language model: one after the other, or where each would if all
of its picture's were there."""
VisualWeights = Literal["equal", "patches"]
"""How much a visual token counts in attention: as one, or as the patches that were merged in it."""
