"""The language model of a checkpoint becomes an ONNX decoder for ONNX Runtime.

Enters: an opened checkpoint. Leaves: `llm/ort/model.onnx`, which takes embeddings and a KV cache
and gives the logits of the last position; the embedding table apart, as float16 rows that every
backend shares; and the tokenizer. The graph itself is built by onnxruntime-genai's model builder,
in a process of its own: it prints as it goes, puts its folder on the import path, and its memory is
the system's again when it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PretrainedConfig

from engines.errors import CheckpointError, OptionError
from engines.manifest import LanguageModel, LlmPrecision, Prompt, Text
from export.checkpoint import Checkpoint

GRAPH_FILE = "llm/ort/model.onnx"
EMBEDDINGS_FILE = "llm/embeddings.safetensors"
TOKENIZER_FILE = "llm/tokenizer.json"

Progress = Callable[[int, int], None]
"""Called with decoder layers read so far, and how many there are."""

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY_KINDS = ("default", "llama3")
_INT4_BLOCK = 32
_LOG_LINES = 15
