"""Read the tensors of a LLaVA checkpoint under one naming, for every transformers release.

`LlavaWeights` reads one part (vision tower, projector, language model) without the others. Only
safetensors files are read, because unpickling a download would run whatever code it carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_GIT_LFS_POINTER = b"version https://git-lfs"


class Part(Enum):
    """One of the three models a LLaVA checkpoint is made of."""

    VISION_TOWER = "vision tower"
    PROJECTOR = "projector"
    LANGUAGE_MODEL = "language model"


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
)


def split_name(stored: str) -> tuple[Part, str] | None:
    """Return the part a stored tensor belongs to and its name in that part's plain model."""
    for pattern, part, prefix in _NAMINGS:
        match = pattern.match(stored)
        if match:
            return part, prefix + stored[match.end() :]
    return None


@dataclass(frozen=True)
class LlavaWeights:
    """Where every tensor of a checkpoint lies.

    Attributes:
        root: the checkpoint's directory.
        location: (part, plain name) -> (file name, stored name).
    """

    root: Path
    location: dict[tuple[Part, str], tuple[str, str]]

    def names(self, part: Part) -> list[str]:
        """Return the plain names of a part's tensors."""
        return [name for owner, name in self.location if owner is part]

    def shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Return each tensor's shape, in the order of `read_one_by_one`; reads headers only."""
        found: dict[str, tuple[int, ...]] = {}
        by_file = self._by_file(part, None)
        for file in sorted(by_file):
            with safe_open(self.root / file, framework="pt") as shard:
                for name, stored in by_file[file]:
                    found[name] = tuple(shard.get_slice(stored).get_shape())
        return found

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
        """Yield a part's tensors file by file, so that one file's worth is in memory at a time."""
        by_file = self._by_file(part, only)
        for file in sorted(by_file):
            with safe_open(self.root / file, framework="pt") as shard:
                yield {name: shard.get_tensor(stored) for name, stored in by_file[file]}

    def read_one_by_one(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield a part's tensors in the order of `read_by_shard`, one in memory at a time."""
        by_file = self._by_file(part, None)
        for file in sorted(by_file):
            for name, stored in by_file[file]:
                with safe_open(self.root / file, framework="pt") as shard:
                    yield name, shard.get_tensor(stored)

    def _by_file(self, part: Part, only: Iterable[str] | None) -> dict[str, list[tuple[str, str]]]:
        """Return file -> (plain name, stored name) of a part's tensors, or of those in `only`."""
        wanted = None if only is None else set(only)
        by_file: dict[str, list[tuple[str, str]]] = {}
        for (owner, name), (file, stored) in self.location.items():
            if owner is part and (wanted is None or name in wanted):
                by_file.setdefault(file, []).append((name, stored))
        return by_file


def find_weights(root: Path) -> LlavaWeights:
    """Locate every tensor of the checkpoint in `root`; reads headers only.

    Raises:
        CheckpointError: no safetensors, a shard missing or damaged, or a part without tensors.
    """
    location: dict[tuple[Part, str], tuple[str, str]] = {}
    for file in _list_shards(root):
        for stored in _read_names(root / file):
            split = split_name(stored)
            if split is not None:
                location[split] = (file, stored)
    missing = [part.value for part in Part if not any(owner is part for owner, _ in location)]
    if missing:
        raise CheckpointError(
            f"{root}: the safetensors files hold no tensors of the {' and the '.join(missing)}. "
            "Expected names such as vision_tower.*, multi_modal_projector.* and language_model.* "
            "(a whole LlavaForConditionalGeneration, not an adapter or one of its parts). "
            "Merge adapters into the model and save it with save_pretrained()."
        )
    return LlavaWeights(root, location)


def _list_shards(root: Path) -> list[str]:
    index = root / INDEX_FILE
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index}: not a safetensors index ({error}). Download the checkpoint again."
            ) from error
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
            f"runs whatever code is in it, so only safetensors is read. If you trust where it came "
            f'from, convert it once: python -c "from transformers import '
            f"LlavaForConditionalGeneration as L; L.from_pretrained({str(root)!r})"
            f'.save_pretrained({str(root) + "-safetensors"!r})", copy the tokenizer and '
            "processor files beside the result, and give that directory instead."
        )
    raise CheckpointError(
        f"{root}: no weights found. Expected {SINGLE_FILE}, or shards with {INDEX_FILE}."
    )


def _read_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            pointer = stream.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER
        fix = (
            "It is a Git LFS pointer, not the weights: run `git lfs pull` in that directory."
            if pointer
            else "It is damaged or cut short: download it again."
        )
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}). {fix}"
        ) from error
