"""Read how a checkpoint's clips are prepared: `video_preprocessor_config.json`."""

from __future__ import annotations

from pathlib import Path

from engines.errors import CheckpointError
from engines.manifest import Preprocessing
from engines.picture_tiles import MOST_CLIP_FRAMES, ClipFrames
from export.checkpoint.processor import preprocessing_of
from export.checkpoint.schema import Json, VideoProcessorFile, checked, read_json

_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Where transformers looks, unless `processor_config.json` says it itself."""


def read_clips(root: Path, whole: Preprocessing) -> ClipFrames:
    """Return how a clip is seen.

    Args:
        root: the checkpoint's directory.
        whole: how the view of a whole picture is prepared. A frame must be prepared in the same
            way, and is in every checkpoint that was published so far.

    Raises:
        CheckpointError: it is prepared in another way, or no file says how.
    """
    file, raw = _find_video_processor(root)
    fields = checked(VideoProcessorFile, raw, file)
    frame = preprocessing_of(file, fields, whole.height)
    frame = frame.model_copy(update={"pad_to_square": False})  # its do_pad is about batches
    if frame != whole:
        differing = [name for name, value in frame if value != getattr(whole, name)]
        raise CheckpointError(
            f"{file}: a frame of a clip is prepared differently from a picture "
            f"({', '.join(differing)}), which the runtime does not do."
        )
    frames = fields.num_frames
    return ClipFrames(frames=None if frames is None else min(frames, MOST_CLIP_FRAMES))


def _find_video_processor(root: Path) -> tuple[Path, Json]:
    nested = root / "processor_config.json"
    if nested.is_file():
        fields = read_json(nested).get("video_processor")
        if isinstance(fields, dict):
            return nested, fields
    for file in (root / name for name in _FILES):
        if file.is_file():
            return file, read_json(file)
    raise CheckpointError(
        f"{root}: no video processor. Expected {' or '.join(_FILES)}, or processor_config.json "
        "with a video_processor in it. Download it from where the weights came from."
    )
