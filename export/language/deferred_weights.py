"""Describe a causal language model whose weights are read only when they are written.

A weight is a `DeferredTensor`: it has a shape and a dtype and remembers how it comes about (a
transpose, three matrices in one), so a graph can be made of a 13B model without reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from engines.errors import CheckpointError

_ASKS_FOR_VALUES = {"__bool__", "__float__", "__int__", "item", "tolist", "numpy"}


class DeferredTensor(Tensor):
    """A tensor without values; `compute` returns them, each time anew."""

    compute: Callable[[], Tensor]

    @classmethod
    def of(
        cls, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], Tensor]
    ) -> DeferredTensor:
        """Return a tensor of that shape and dtype whose values `compute` will give."""
        deferred = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        deferred.compute = compute
        return deferred

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func.__name__ in _ASKS_FOR_VALUES:  # is any bias not zero?
            return func(*map(_values, args), **named)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
        if not isinstance(result, Tensor):
            return result
        return cls.of(
            tuple(result.shape),
            result.dtype,
            lambda: func(*map(_values, args), **{k: _values(v) for k, v in named.items()}),
        )


def _values(argument: Any) -> Any:
    if isinstance(argument, DeferredTensor):
        return argument.compute()
    if isinstance(argument, list | tuple):
        return type(argument)(map(_values, argument))
    return argument


def deferred_language_model(
    config: PretrainedConfig, read: Callable[[str], Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """Return the model with every weight deferred.

    Args:
        config: of the plain language model; its `dtype` is the stored one.
        read: returns a tensor of the checkpoint by its plain name.
        shapes: of all tensors there are; a tied head need not be among them.

    Raises:
        CheckpointError: a weight is missing, left over, or has another shape than `config` says.
    """
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    problems = []
    used = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        source = name
        if bool(config.tie_word_embeddings) and name == "lm_head.weight":
            source = "model.embed_tokens.weight"
        used |= {name, source}
        found, wanted = shapes.get(source), tuple(parameter.shape)
        if found != wanted:
            problems.append(f"{source}: {'missing' if found is None else list(found)}, "
                            f"expected {list(wanted)}")  # fmt: skip
            continue
        _replace(model, name, DeferredTensor.of(wanted, parameter.dtype, _reader(read, source)))
    left_over = sorted(n for n in set(shapes) - used if not n.endswith("rotary_emb.inv_freq"))
    problems += [f"{name}: not a tensor of this model" for name in left_over]
    if problems:
        told = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise CheckpointError(
            f"The language model's tensors are not those that config.json describes ({told}). "
            "Config and weights come from different models, or the download is incomplete: "
            "download the checkpoint again."
        )
    return model


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _replace(model: nn.Module, name: str, weight: DeferredTensor) -> None:
    """Put a deferred tensor where a parameter was; `isinstance(_, Parameter)` stays true."""
    path, _, attribute = name.rpartition(".")
    weight._is_param = True
    model.get_submodule(path)._parameters[attribute] = weight  # type: ignore[assignment]
