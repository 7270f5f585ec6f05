"""Read and write the tensors of a LLaVA checkpoint under one naming, for every transformers.

`LlavaWeights` reads one part (vision tower, projector, language model) without the others. Only
safetensors files are read, because unpickling a download would run whatever code it carries.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.errors import CheckpointError
from engines.termination import leave_if_asked
from export.checkpoint.schema import IndexFile, checked, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
"""Buffers that old releases of transformers wrote, and that every release computes."""
_GIT_LFS_POINTER = b"version https://git-lfs"


class Part(Enum):
    """One of the models a LLaVA checkpoint is made of; the last is a single vector."""

    VISION_TOWER = "vision tower"
    PROJECTOR = "projector"
    LANGUAGE_MODEL = "language model"
    NEWLINE = "image newline"


LLAVA_PARTS = (Part.VISION_TOWER, Part.PROJECTOR, Part.LANGUAGE_MODEL)
"""Of a checkpoint that sees a picture as one square."""


# Three namings are in the wild. transformers 4: `language_model.model.layers.0...`,
# `language_model.lm_head.weight`, `vision_tower.vision_model.encoder...`. transformers 5 in memory:
# `model.language_model.layers.0...`, `lm_head.weight`, `model.vision_tower.encoder...`; on disk it
# writes a mixture of the two. The plain models want what is left when the prefixes are gone.
_NAMINGS: tuple[tuple[re.Pattern[str], Part, str], ...] = (
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), Part.VISION_TOWER, ""),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), Part.PROJECTOR, ""),
    (re.compile(r"^(?:language_model\.)?lm_head\."), Part.LANGUAGE_MODEL, "lm_head."),
    (re.compile(r"^language_model\.model\."), Part.LANGUAGE_MODEL, "model."),
    (re.compile(r"^model\.language_model\."), Part.LANGUAGE_MODEL, "model."),
    (re.compile(r"^(?:model\.)?image_newline$"), Part.NEWLINE, "image_newline"),
)


def split_name(stored: str) -> tuple[Part, str] | None:
    """Return the part a stored tensor belongs to and its name in that part's plain model."""
    for pattern, part, prefix in _NAMINGS:
        match = pattern.match(stored)
        if match:
            return part, prefix + stored[match.end() :]
    return None


_PREFIXES = {
    Part.VISION_TOWER: "vision_tower.vision_model.",
    Part.PROJECTOR: "multi_modal_projector.",
    Part.LANGUAGE_MODEL: "language_model.",
    Part.NEWLINE: "",
}


def stored_name(part: Part, name: str) -> str:
    """Return the name that transformers 4 and the hub's checkpoints store a tensor under."""
    return _PREFIXES[part] + name


def is_computed(stored: str) -> bool:
    """Tell whether a stored tensor is one that every model computes for itself."""
    return bool(_COMPUTED.search(stored))


@dataclass(frozen=True)
class LlavaWeights:
    """Where every tensor of a checkpoint lies.

    Attributes:
        root: the checkpoint's directory.
        location: (part, plain name) -> (file name, stored name).
    """

    root: Path
    location: dict[tuple[Part, str], tuple[str, str]]

    def shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Return each tensor's shape, in the order of `read_one_by_one`; reads headers only."""
        found: dict[str, tuple[int, ...]] = {}
        for file, named in sorted(self._by_file(part, None).items()):
            with _opened(self.root / file) as shard:
                for name, stored in named:
                    found[name] = tuple(shard.get_slice(stored).get_shape())
        return found

    def names(self, part: Part) -> list[str]:
        """Return the plain names of a part's tensors."""
        return [name for owner, name in self.location if owner is part]

    def read(self, part: Part, only: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return a part's tensors, or those named in `only`, in their stored dtype."""
        wanted = None if only is None else set(only)
        return {
            name: tensor
            for shard in self.read_by_shard(part, wanted)
            for name, tensor in shard.items()
        }

    def read_by_shard(
        self, part: Part, only: Iterable[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield a part's tensors file by file, so that one file's worth is in memory at a time.

        Raises:
            CheckpointError: a file is damaged, or a tensor holds NaN or infinity.
        """
        wanted = None if only is None else set(only)
        for file, named in sorted(self._by_file(part, wanted).items()):
            with _opened(self.root / file) as shard:
                tensors = {name: shard.get_tensor(stored) for name, stored in named}
            for name, stored in named:
                _refuse_not_finite(tensors[name], self.root / file, stored)
            yield tensors

    def read_one_by_one(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield a part's tensors in the order of `read_by_shard`, one in memory at a time.

        Raises:
            CheckpointError: a file is damaged, or a tensor holds NaN or infinity.
        """
        for file, named in sorted(self._by_file(part, None).items()):
            for name, stored in named:
                with _opened(self.root / file) as shard:
                    tensor = shard.get_tensor(stored)
                _refuse_not_finite(tensor, self.root / file, stored)
                yield name, tensor

    def _by_file(self, part: Part, wanted: set[str] | None) -> dict[str, list[tuple[str, str]]]:
        by_file: dict[str, list[tuple[str, str]]] = {}
        for (owner, name), (file, stored) in self.location.items():
            if owner is part and (wanted is None or name in wanted):
                by_file.setdefault(file, []).append((name, stored))
        return by_file


def _refuse_not_finite(tensor: Tensor, file: Path, stored: str) -> None:
    """Refuse NaN and infinity: the extremes are found in one pass, and NaN is both of them."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (value.item() for value in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"{file}: the tensor {stored} holds NaN or infinity. The training diverged or the file "
            "is damaged: download it again, or take an earlier checkpoint."
        )


def find_weights(root: Path, parts: Sequence[Part] = LLAVA_PARTS) -> LlavaWeights:
    """Locate every tensor of the checkpoint in `root`; reads headers only.

    Args:
        root: the checkpoint's directory.
        parts: what it is made of.

    Raises:
        CheckpointError: no safetensors, a shard missing or damaged, or a part without tensors.
    """
    location: dict[tuple[Part, str], tuple[str, str]] = {}
    strange: list[str] = []
    for file in _list_shards(root):
        for stored in _read_names(root / file):
            split = split_name(stored)
            if is_computed(stored):
                continue
            if split is None or split[0] not in parts:
                strange.append(stored)
            elif split in location:
                raise CheckpointError(
                    f"{root}: {stored} in {file} and {location[split][1]} in {location[split][0]} "
                    "are the same tensor. Keep one of them, or download the checkpoint again."
                )
            else:
                location[split] = (file, stored)
    missing = [part.value for part in parts if not any(owner is part for owner, _ in location)]
    if missing:
        raise CheckpointError(
            f"{root}: the safetensors files hold no tensors of the {' and the '.join(missing)}. "
            "Expected names such as vision_tower.*, multi_modal_projector.* and language_model.* "
            "(a whole LlavaForConditionalGeneration, not an adapter or one of its parts). "
            "Merge adapters into the model and save it with save_pretrained()."
        )
    if strange:
        raise CheckpointError(
            f"{root}: {len(strange)} tensors belong to no part of a LLaVA, among them "
            f"{', '.join(sorted(strange)[:5])}. Foveate would leave them out, and the model would "
            "be another one."
        )
    return LlavaWeights(root, location)


def write_shards(shards: Iterable[dict[str, Tensor]], directory: Path) -> None:
    """Write files of tensors, each before the next is asked for, and the index that names them."""
    weight_map: dict[str, str] = {}
    numbers = count(1)
    for shard in shards:
        name = f"model-{next(numbers):05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)  # safetensors writes for its owner alone
        weight_map |= dict.fromkeys(shard, name)
        del shard  # before the next is made; enumerate would keep it too
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1), "utf-8")


def _list_shards(root: Path) -> list[str]:
    index = root / INDEX_FILE
    if index.is_file():
        files = sorted(set(checked(IndexFile, read_json(index), index).weight_map.values()))
        absent = [file for file in files if not (root / file).is_file()]
        if absent:
            raise CheckpointError(
                f"{root}: {len(absent)} of {len(files)} weight shards named in {INDEX_FILE} are "
                f"missing: {', '.join(absent)}. Download the checkpoint again, all of it."
            )
        return files
    if (root / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in root.glob(s))
    if pickled:
        raise CheckpointError(
            f"{root}: the weights are pickled ({', '.join(pickled[:3])}), and unpickling a file "
            "can run whatever code is in it, so only safetensors is read. Convert it once, without "
            f"running any: `python -m export.convert_checkpoint {root} {root}-safetensors`, and "
            "give that directory instead."
        )
    raise CheckpointError(
        f"{root}: no weights found. Expected {SINGLE_FILE}, or shards with {INDEX_FILE}."
    )


def _read_names(file: Path) -> list[str]:
    with _opened(file) as shard:
        return list(shard.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, and say what is wrong with one that is damaged."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        leave_if_asked()
        fix = (
            "It is a Git LFS pointer, not the weights: run `git lfs pull` in that directory."
            if _is_pointer(file)
            else "It is damaged or cut short: download it again."
        )
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}). {fix}"
        ) from error


def _is_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER
