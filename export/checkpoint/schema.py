"""What the JSON files of a checkpoint may say, as far as Foveate reads them.

Enters: JSON that somebody wrote, or damaged. Leaves: typed values, or one `CheckpointError` with
every problem of the file. transformers fills in what is left out; what is there must be of its type
and of a size that a model can have, because layers and tables are made as these numbers say.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from engines.errors import CheckpointError
from engines.manifest import list_problems
from engines.manifest_fields import Deviation, Mean, Side, TokenId

Json = dict[str, Any]
FileT = TypeVar("FileT", bound="CheckpointFile")

ASPECT_RATIO = "anyres_max_"
"""LLaVA-OneVision's way with pictures, before the number of tiles."""

_MOST_BYTES = 64 << 20

Width = Annotated[int, Field(gt=0, le=2**17)]
Heads = Annotated[int, Field(gt=0, le=1024)]
Layers = Annotated[int, Field(gt=0, le=1024)]


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


TokenIds = Annotated[list[TokenId], BeforeValidator(_as_list)]
"""One id, or several."""


def _checked_file_name(name: str) -> str:
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\\" in name or not name.isprintable():
        raise ValueError("is not the name of a file in the checkpoint's directory")
    return name


def _checked_shard_name(name: str) -> str:
    _checked_file_name(name)
    if not name.endswith(".safetensors"):
        raise ValueError("is not a .safetensors file")
    return name


class CheckpointFile(BaseModel):
    """A file, of which the fields named here are read; null is the same as nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class VisionSizes(CheckpointFile):
    """Sizes of the vision tower."""

    hidden_size: Width = 1
    intermediate_size: Width = 1
    num_hidden_layers: Layers = 1
    num_attention_heads: Heads = 1
    image_size: Side = 1
    patch_size: Side = 1
    num_channels: Annotated[int, Field(ge=3, le=3)] = 3


class TextSizes(CheckpointFile):
    """Sizes of the language model."""

    vocab_size: Annotated[int, Field(gt=0, le=2**22)] = 1
    hidden_size: Width = 1
    intermediate_size: Width = 1
    num_hidden_layers: Layers = 1
    num_attention_heads: Heads = 1
    num_key_value_heads: Heads = 1
    head_dim: Width = 1
    max_position_embeddings: Annotated[int, Field(gt=0, le=2**27)] = 1
    eos_token_id: TokenIds = []


def _checked_aspect_ratio(value: str) -> str:
    if not re.fullmatch(f"{ASPECT_RATIO}[1-9][0-9]{{0,3}}", value):
        raise ValueError(f"is not {ASPECT_RATIO} and a number of tiles, for example anyres_max_9")
    return value


Resolutions = Annotated[list[tuple[Side, Side]], Field(min_length=1, max_length=256)]
"""Height and width of each, in pixels."""


class ConfigFile(CheckpointFile):
    """`config.json`."""

    vision_config: VisionSizes = VisionSizes()
    text_config: TextSizes = TextSizes()
    image_token_index: TokenId = 0
    image_token_id: TokenId = 0
    image_grid_pinpoints: Resolutions | None = None
    vision_aspect_ratio: Annotated[str, AfterValidator(_checked_aspect_ratio)] | None = None


class GenerationFile(CheckpointFile):
    """`generation_config.json`."""

    eos_token_id: TokenIds = []
    max_new_tokens: Annotated[int, Field(gt=0, le=2**27)] | None = None


class Size(CheckpointFile):
    """A size in pixels: one side, or both."""

    shortest_edge: Side | None = None
    height: Side | None = None
    width: Side | None = None


class ImageProcessorFile(CheckpointFile):
    """`preprocessor_config.json`; the fields of CLIPImageProcessor plus LLaVA's padding."""

    image_processor_type: str = ""
    feature_extractor_type: str = ""
    do_resize: bool = True
    size: Side | Size | None = None
    resample: int = 3
    do_center_crop: bool = True
    crop_size: Side | Size | None = None
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0, le=1)] = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[Mean, Mean, Mean] | None = None
    image_std: tuple[Deviation, Deviation, Deviation] | None = None
    do_pad: bool = False
    image_grid_pinpoints: Resolutions | None = None


class VideoProcessorFile(ImageProcessorFile):
    """`video_preprocessor_config.json`; without a field, transformers' own value."""

    size: Side | Size | None = Size(height=384, width=384)
    do_center_crop: bool = False
    image_mean: tuple[Mean, Mean, Mean] | None = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[Deviation, Deviation, Deviation] | None = (0.26862954, 0.26130258, 0.27577711)
    num_frames: Annotated[int, Field(gt=0, le=2**16)] | None = None


class IndexFile(CheckpointFile):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, Annotated[str, AfterValidator(_checked_shard_name)]] = Field(min_length=1)


class PickledIndexFile(CheckpointFile):
    """`pytorch_model.bin.index.json`; an index of safetensors is one too."""

    weight_map: dict[str, Annotated[str, AfterValidator(_checked_file_name)]] = Field(min_length=1)


def read_text(file: Path) -> str:
    """Read a text file of a checkpoint.

    Raises:
        CheckpointError: it is not a plain file, too large, or not UTF-8.
    """
    try:
        kind = file.stat()
        if not stat.S_ISREG(kind.st_mode) or kind.st_size > _MOST_BYTES:
            raise CheckpointError(
                f"{file}: not a plain file of at most {_MOST_BYTES >> 20} MB. Download it again."
            )
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not readable ({error}). Download it again.") from error


def read_json(file: Path) -> Json:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not readable JSON ({error}). Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, got {type(content).__name__}. "
            "Download the file again."
        )
    return content


def checked(schema: type[FileT], fields: Json, file: Path) -> FileT:
    """Return the fields of a file with their types.

    Raises:
        CheckpointError: a field has another type or size; all problems are named.
    """
    try:
        return schema.model_validate(fields)
    except (ValidationError, RecursionError) as error:
        told = list_problems(error) if isinstance(error, ValidationError) else [str(error)]
        raise CheckpointError(
            f"{file}: {'; '.join(told[:20])}. Correct the file, or take it from the checkpoint's "
            "publisher again."
        ) from error
