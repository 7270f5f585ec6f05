"""Run a language model in float32 with one of its layers in memory.

The layers of transformers' model read their weights when they are about to run and forget them
afterwards. A 7B model takes about 2 GB instead of 27, and each pass reads the checkpoint once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from export.checkpoint.llava import Checkpoint
from export.checkpoint.weights import LlavaWeights, Part
from export.language.causal_lm import EMBEDDINGS, HEAD


def stream_language_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the language model in float32, its layers read as they run.

    Raises:
        CheckpointError: a file of the checkpoint cannot be read.
    """
    config = checkpoint.plain_text_config()
    config.dtype = torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # computed, not in the weights
    layers = dict(model.model.layers.named_children())
    inside = {
        f"model.layers.{number}.{name}"
        for number, layer in layers.items()
        for name, _ in layer.named_parameters()
    }
    tied = bool(config.tie_word_embeddings)
    outside = {name for name, _ in model.named_parameters()} - inside
    _load(model, checkpoint.weights, {name: name for name in outside - ({HEAD} if tied else set())})
    if tied:
        model.lm_head.weight = model.get_parameter(EMBEDDINGS)
    for number, layer in layers.items():
        names = {name: f"model.layers.{number}.{name}" for name, _ in layer.named_parameters()}
        layer.register_forward_pre_hook(partial(_fill_layer, checkpoint.weights, names))
        layer.register_forward_hook(_empty_layer)
    streamed: PreTrainedModel = model.eval()
    return streamed


def _fill_layer(
    weights: LlavaWeights, names: dict[str, str], layer: nn.Module, inputs: object
) -> None:
    _load(layer, weights, names)


def _empty_layer(layer: nn.Module, inputs: object, output: object) -> None:
    for name, parameter in list(layer.named_parameters()):
        _put(layer, name, torch.empty_like(parameter, device="meta"))


def _load(module: nn.Module, weights: LlavaWeights, names: dict[str, str]) -> None:
    """Put the checkpoint's tensors in place of a module's parameters."""
    tensors = weights.read(Part.LANGUAGE_MODEL, names.values())
    for name, stored in names.items():
        _put(module, name, tensors.pop(stored).float())


def _put(module: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, nn.Parameter(values, requires_grad=False))
