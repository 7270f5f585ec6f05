"""Write the tuned checkpoint: the old one with the new projector and the adapters merged in.

Tensors keep their names, dtypes and files. Tensors that did not learn keep their bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.errors import CheckpointError
from engines.staging import staged_directory
from export.checkpoint.llava import Checkpoint
from export.checkpoint.weights import INDEX_FILE, Part
from export.tune.student import Student, adapter_changes

_COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json", INDEX_FILE,
)  # fmt: skip


def write_tuned_checkpoint(
    checkpoint: Checkpoint, student: Student, out: Path, extra: Mapping[str, str]
) -> None:
    """Write the checkpoint.

    Args:
        checkpoint: what tuning began with.
        student: what it ended with.
        out: directory to write; one that is there is replaced.
        extra: text files to put beside the weights, by name.

    Raises:
        CheckpointError: the disk does not take it, or a weight would leave its dtype's range.
    """
    changed = _changed_tensors(checkpoint, student)
    files = sorted({file for file, _ in checkpoint.weights.location.values()})
    size = sum((checkpoint.root / file).stat().st_size for file in files)
    with staged_directory(out, CheckpointError, size) as staging:
        for file in files:
            _write_shard(checkpoint.root / file, staging / file, changed.get(file, {}))
        copied = [*(checkpoint.root / name for name in _COPIED), *checkpoint.tokenizer_files()]
        for source in filter(Path.is_file, copied):
            shutil.copy2(source, staging / source.name)
        for name, text in extra.items():
            (staging / name).write_text(text, "utf-8")


def _changed_tensors(checkpoint: Checkpoint, student: Student) -> dict[str, dict[str, Tensor]]:
    """Return file -> stored name -> what its tensor is now, in its stored dtype."""
    now = {(Part.PROJECTOR, name): one for name, one in student.projector.state_dict().items()}
    changes = adapter_changes(student.llm)
    before = checkpoint.weights.read(Part.LANGUAGE_MODEL, changes)
    for name, change in changes.items():
        now[Part.LANGUAGE_MODEL, name] = before[name].float() + change
    by_file: dict[str, dict[str, Tensor]] = {}
    for key, tensor in now.items():
        file, stored = checkpoint.weights.location[key]
        by_file.setdefault(file, {})[stored] = tensor.detach().cpu()
    return by_file


def _write_shard(source: Path, destination: Path, changed: Mapping[str, Tensor]) -> None:
    if not changed:
        shutil.copy2(source, destination)
        return
    with safe_open(source, "pt") as shard:
        metadata: Any = shard.metadata()
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    for name, tensor in changed.items():
        tensors[name] = tensor.to(tensors[name].dtype).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(
                f"{destination.name}: {name} no longer fits {tensors[name].dtype}. Tune with a "
                "lower --learning-rate, or begin with a checkpoint in float32."
            )
    save_file(tensors, destination, metadata=metadata)
