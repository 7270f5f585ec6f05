"""Weights that are read when they are written: what is done to them is done then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.errors import CheckpointError
from export.language.deferred_weights import DeferredTensor, deferred_language_model
from tests.tiny_language import tiny_llava

VALUES = torch.arange(6.0).reshape(2, 3)


def deferred(reads: list[int]) -> DeferredTensor:
    def read() -> Tensor:
        reads.append(1)
        return VALUES

    return DeferredTensor.of((2, 3), torch.float32, read)


def test_nothing_is_read_before_it_is_computed() -> None:
    reads: list[int] = []
    whole = torch.cat([deferred(reads), deferred(reads)]).T.to(torch.float16) + 1
    assert isinstance(whole, DeferredTensor)
    assert (tuple(whole.shape), whole.dtype, reads) == ((3, 4), torch.float16, [])
    assert torch.equal(whole.compute(), torch.cat([VALUES, VALUES]).T.half() + 1)
    assert reads == [1, 1]


def test_a_question_about_values_is_answered() -> None:
    assert torch.count_nonzero(deferred([])) > 0
    assert (deferred([]).sum() == 15).item()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.norm.weight": None}, "model.norm.weight: missing, expected .64."),
        ({"model.norm.weight": (65,)}, r"model.norm.weight: \[65\], expected \[64\]"),
        ({"model.extra.weight": (1,)}, "model.extra.weight: not a tensor of this model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, tuple[int, ...] | None], says: str
) -> None:
    model = tiny_llava()
    state = {
        name.replace("model.language_model.", "model."): tuple(value.shape)
        for name, value in model.state_dict().items()
        if "language_model" in name or name.startswith("lm_head")
    }
    config = model.config.text_config
    shapes = {name: shape for name, shape in (state | change).items() if shape is not None}
    with pytest.raises(CheckpointError, match=says):
        deferred_language_model(config, lambda name: torch.empty(0), shapes)
