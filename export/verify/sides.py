"""PyTorch's side of a comparison, and which checkpoint it is of.

What PyTorch sees is computed once for all bundles that prepare pictures, reduce tokens and write
prompts in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.frame_size import frame_size_of
from engines.manifest import VisionGraph
from export.checkpoint.llava import Checkpoint
from export.reducers import make_reducer
from export.verify.reference import Observation, VisionReference
from runtime.vision import Pixels
from runtime.vision.preprocess import PixelValues, preprocess_batch


def recipe_of(bundle: Bundle, graph: VisionGraph) -> str:
    """Return what PyTorch's side depends on, as a key: preprocessing, reducer and prompt."""
    parts = (bundle.preprocessing, graph.reducer, bundle.manifest.prompt)
    return json.dumps([part.model_dump(mode="json") for part in parts], sort_keys=True)


class TorchVision:
    """PyTorch's tower, reducer and projector for all bundles of one recipe.

    Raises:
        CheckpointError: a tensor of the tower or the projector is missing or misshapen.
    """

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle, graph: VisionGraph) -> None:
        spec = graph.reducer
        self.reference = VisionReference(checkpoint, make_reducer(spec.name, **spec.options))
        self.preprocessing = bundle.preprocessing

    def look(self, picture: Pixels) -> tuple[PixelValues, Observation]:
        """Return the pixels that both sides get, float32[1, 3, H, W], and what PyTorch sees."""
        pixels = preprocess_batch([picture], self.preprocessing)
        return pixels, self.reference.observe(pixels)


def find_checkpoint(bundles: Sequence[Bundle]) -> str:
    """Return where the checkpoint lies whose name bundles record.

    Raises:
        OptionError: they record several; or it is neither here nor in ``models/``, and not the
            name of a repository.
    """
    names = {bundle.manifest.model: bundle.root for bundle in bundles}
    if len(names) > 1:
        told = ", ".join(f"{root} from {name}" for name, root in names.items())
        raise OptionError(
            f"The bundles were built from different checkpoints: {told}. Compare those of one "
            "checkpoint with each other, or give the checkpoint with --model."
        )
    name = next(iter(names))
    for folder in (Path(name), Path("models", name)):
        if folder.is_dir():
            return str(folder)
    if "/" in name:
        return name
    raise OptionError(
        f"The bundle was built from {name}, which is neither here nor in models/. Give the "
        "checkpoint's directory with --model."
    )


def refuse_other_checkpoint(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Check that a bundle can have been built from a checkpoint.

    Raises:
        OptionError: a size differs; all that do are named. Or the bundle takes camera frames.
    """
    manifest = bundle.manifest
    if manifest.tiles is not None:
        raise OptionError(
            f"{bundle.root} cuts pictures into tiles, and this comparison is made of pictures that "
            "are one square each. `tests/export/test_llava_next.py` compares such bundles with "
            "transformers."
        )
    if frame_size_of(manifest.vision_files.files[0]) is not None:
        raise OptionError(
            f"{bundle.root} takes camera frames of one size, and both sides are compared on pixels "
            "of pictures of any size. Build it without --input uint8 as well and verify that one: "
            "all that differs is how a frame becomes pixels."
        )
    vision: Any = checkpoint.vision_config
    text: Any = checkpoint.text_config
    side = vision.image_size // vision.patch_size
    graph = manifest.vision[0]
    sizes = [
        ("patches", graph.patch_rows * graph.patch_columns, side * side),
        ("hidden_size of the language model", manifest.text.hidden_size, text.hidden_size),
    ]
    problems = [f"{what} {has} and {wants}" for what, has, wants in sizes if has != wants]
    if problems:
        raise OptionError(
            f"{bundle.root} was not built from {checkpoint.name}: {'; '.join(problems)}. It was "
            f"built from {manifest.model}; give that with --model."
        )
