"""Types of the fields of `bundle.json`, each with its bounds."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MANIFEST_NAME = "bundle.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _checked_relative_path(path: str) -> str:
    parts = path.split("/")
    plain = all(part not in {"", ".", ".."} for part in parts) and path.isprintable()
    if not plain or "\\" in path or ":" in parts[0] or path == MANIFEST_NAME:
        raise ValueError("is not a path inside the bundle, such as decoder/model.onnx")
    return str(PurePosixPath(path))


RelativePath = Annotated[str, AfterValidator(_checked_relative_path)]
"""A file inside the bundle, with forward slashes: it cannot name anything outside."""

Side = Annotated[int, Field(gt=0, le=8192)]
"""Pixels; the largest tower in use takes 1024."""
Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Dtype = Literal["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"]


class Record(BaseModel):
    """A JSON object whose fields are all known; frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
