"""Compute the reduced tokens of every picture once and keep them on disk.

Nothing before the projector is trained, so an epoch does not run the tower. 32 tokens of CLIP-L are
131 kB a picture. An interrupted run continues with the first picture that is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import PictureError
from engines.staging import staged_file
from export.checkpoint.llava import Checkpoint
from export.reducers import Reducer
from export.towers.registry import make_tower
from export.tracks import Track
from runtime.vision import Pixels
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch

_PICTURES_AT_ONCE = 8
_TODO, _UNREADABLE = -1, 0
"""Values of `valid` beside the counts, which are 1 or more."""


@dataclass(frozen=True)
class ReducedPictures:
    """Pictures as the projector is to see them.

    Attributes:
        index: the picture's file -> its row.
        tokens: float32[P, N, D]; features the reducer left.
        valid: int32[P]; how many of them are real.
    """

    index: dict[str, int]
    tokens: NDArray[np.float32]
    valid: NDArray[np.int32]

    @property
    def unreadable(self) -> set[str]:
        """Pictures that could not be decoded."""
        return {name for name, row in self.index.items() if self.valid[row] == _UNREADABLE}


def reduce_pictures(
    checkpoint: Checkpoint,
    reducer: Reducer,
    images: Path,
    names: Sequence[str],
    cache: Path,
    track: Track,
    device: str = "cpu",
) -> ReducedPictures:
    """Run tower and reducer over pictures, or find again what was computed before.

    Args:
        checkpoint: whose tower runs, in float32.
        reducer: what is to be tuned for.
        images: directory of the pictures.
        names: their files in it, each once.
        cache: directory to keep the tokens in.
        track: shows progress.
        device: where the tower runs.
    """
    tower: Any = make_tower(
        checkpoint.vision_model(), checkpoint.feature_layers, reducer.scoring
    ).eval()
    count = reducer.token_count(checkpoint.patch_side**2)
    shape = (len(names), count, checkpoint.feature_width)
    folder = cache / _digest(tower, checkpoint, reducer, images, names)
    tokens, valid = _open_arrays(folder, shape)
    tower.to(device)
    for start in track(range(0, len(names), _PICTURES_AT_ONCE), "Tower and reducer"):
        rows = [row for row in range(start, start + _PICTURES_AT_ONCE) if row < len(names)]
        rows = [row for row in rows if valid[row] == _TODO]
        decoded = {row: _decode(images / names[row]) for row in rows}
        pictures = {row: picture for row, picture in decoded.items() if picture is not None}
        counts = dict.fromkeys(rows, _UNREADABLE)
        if pictures:
            batch = preprocess_batch(list(pictures.values()), checkpoint.preprocessing)
            with torch.no_grad():
                reduced = reducer(tower(torch.from_numpy(batch).to(device)))
            done = list(pictures)
            tokens[done] = reduced.tokens.float().cpu().numpy()
            counts |= dict(zip(done, reduced.valid.tolist(), strict=True))
            tokens.flush()
        for row, count in counts.items():
            valid[row] = count
        valid.flush()
    return ReducedPictures({name: row for row, name in enumerate(names)}, tokens, valid)


def _decode(file: Path) -> Pixels | None:
    try:
        return load_picture(file)
    except PictureError:
        return None


def _open_arrays(folder: Path, shape: tuple[int, ...]) -> tuple[Any, Any]:
    valid_file, tokens_file = folder / "valid.npy", folder / "tokens.npy"
    if not valid_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(tokens_file, "w+", np.float32, shape).flush()
        with staged_file(valid_file) as staged:
            np.save(staged, np.full(shape[0], _TODO, np.int32))
    return np.load(tokens_file, mmap_mode="r+"), np.load(valid_file, mmap_mode="r+")


def _digest(
    tower: torch.nn.Module,
    checkpoint: Checkpoint,
    reducer: Reducer,
    images: Path,
    names: Sequence[str],
) -> str:
    """Return a digest of everything the tokens depend on."""
    digest = hashlib.sha256()
    for name, tensor in tower.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    said = {
        "feature_layers": checkpoint.feature_layers,
        "preprocessing": checkpoint.preprocessing.model_dump(),
        "reducer": [reducer.name, reducer.options],
        "pictures": [[name, *_stamp(images / name)] for name in names],
    }
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns
