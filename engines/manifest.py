"""`bundle.json`: what a bundle says about itself, checked against a schema.

Enters: JSON text. Leaves: a frozen `Manifest`, or one `BundleError` naming every problem at once.
The runtime needs nothing that is not named here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Precision = Literal["fp32", "fp16", "int8", "mixed"]
LlmPrecision = Literal["fp32", "int4"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*(/[^/\\.][^/\\]*)*$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Record):
    """One named input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """A string is a dynamic axis, for example ``"batch"``."""


class Preprocessing(_Record):
    """How a picture becomes `pixel_values`; the fields of CLIPImageProcessor plus LLaVA's padding.

    Applied in the order: RGB, pad to square, resize, centre crop, rescale, normalise.
    """

    pad_to_square: bool = False
    """LLaVA-1.5's ``image_aspect_ratio="pad"``: pad with the mean colour before resizing."""
    resize: Literal["shortest_edge", "exact", "none"] = "shortest_edge"
    resize_height: int = Field(gt=0)
    """With ``shortest_edge`` the shorter side; then `resize_width` is the same number."""
    resize_width: int = Field(gt=0)
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    center_crop: bool = True
    height: int = Field(gt=0)
    """Height of `pixel_values`."""
    width: int = Field(gt=0)
    rescale_factor: float = Field(gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ReducerSpec(_Record):
    """The token reducer inside the graph."""

    name: str
    tokens: int = Field(gt=0)
    """N: visual tokens out of the graph, padding included."""
    options: dict[str, int | float | str | bool] = {}


class VisionGraph(_Record):
    """One ONNX file: tower, reducer and projector."""

    file: RelativePath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reducer: ReducerSpec
    precision: Precision
    opset: int
    patch_rows: int = Field(gt=0)
    patch_columns: int = Field(gt=0)


class LanguageModel(_Record):
    """The decoder of one backend."""

    backend: str
    file: RelativePath
    precision: str


class Prompt(_Record):
    """How a conversation becomes token ids."""

    tokenizer: RelativePath
    chat_template: str
    """Jinja source, from the checkpoint."""
    image_token: str
    image_token_id: int
    bos_token: str | None
    eos_token: str | None
    add_bos_token: bool
    stop_token_ids: tuple[int, ...]


class Text(_Record):
    """The language model's width and its embedding table, which every backend shares."""

    embeddings: RelativePath
    """safetensors with one tensor ``embed_tokens``, float16[V, D]."""
    vocabulary: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    context_length: int = Field(gt=0)


class Manifest(_Record):
    """Everything `bundle.json` holds."""

    schema_version: int
    model: str
    """Name of the checkpoint, for people."""
    target: str
    vision: tuple[VisionGraph, ...] = Field(min_length=1)
    """The first one is the default."""
    preprocessing: Preprocessing
    text: Text
    prompt: Prompt
    language_models: tuple[LanguageModel, ...] = Field(min_length=1)
    """The first one is the default."""
    versions: dict[str, str]
    """Tool -> version that built the bundle."""
    calibration_digest: Sha256 | None = None
    files: dict[RelativePath, Sha256]
    """Every file of the bundle but `bundle.json` itself."""
