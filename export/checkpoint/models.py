"""Make transformers' models of a checkpoint's tensors, none of which may be left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from engines.errors import CheckpointError
from export.checkpoint.weights import Part


def wraps_vision_model(config: PretrainedConfig) -> bool:
    """Return whether this release of transformers keeps the transformer one module deeper."""
    with torch.device("meta"):
        return hasattr(architecture_of(config)(config), "vision_model")


def architecture_of(
    config: PretrainedConfig, mapping: Any = MODEL_MAPPING
) -> type[PreTrainedModel]:
    """Return the class of transformers that a configuration describes."""
    mapped: Any = mapping[type(config)]
    architecture: type[PreTrainedModel] = mapped[0] if isinstance(mapped, tuple) else mapped
    return architecture


def causal_lm_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the language model that a configuration describes."""
    return architecture_of(config, MODEL_FOR_CAUSAL_LM_MAPPING)


def fill(
    root: Path,
    part: Part,
    architecture: type[PreTrainedModel],
    config: PretrainedConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return a part as transformers' model of these tensors.

    Raises:
        CheckpointError: a tensor is missing, too many or has another shape.
    """
    try:
        with _quiet_transformers():
            filled: Any = architecture.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # transformers, given a configuration from elsewhere
        raise wrong_tensors(root, part, str(error)) from error
    model, report = filled
    if report["missing_keys"]:
        raise wrong_tensors(root, part, f"missing: {', '.join(sorted(report['missing_keys']))}")
    checked: PreTrainedModel = model.eval()
    return checked


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hush transformers' own report of missing tensors: ours is an error and says what to do."""
    speech: Any = logging  # its functions carry no annotations
    verbosity, bars = speech.get_verbosity(), speech.is_progress_bar_enabled()
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    try:
        yield
    finally:
        speech.set_verbosity(verbosity)
        if bars:
            speech.enable_progress_bar()


def wrong_tensors(root: Path, part: Part, details: str) -> CheckpointError:
    """Say that the tensors of a part are not those of its configuration."""
    shown = details if len(details) < 600 else details[:600] + " ..."
    return CheckpointError(
        f"{root}: the {part.value}'s tensors are not those that config.json describes "
        f"({' '.join(shown.split())}). Config and weights come from different models, or the "
        "download is incomplete: download the checkpoint again."
    )
