"""Read and write a calibration as one JSON file with a checksum.

The file names the weights it was made on by their sha256, layer by layer. It therefore fits every
graph of a checkpoint (other reducers, other budgets) and no graph of another checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from calibration.agreement.measured import MeasuredAgreement
from engines.errors import CalibrationError
from engines.staging import staged_file

SCHEMA_VERSION = 1
_AGAIN = "Calibrate again with `python -m calibration.calibrate`."


def _vector_from_text(given: Any) -> NDArray[np.float32]:
    if isinstance(given, str):
        try:
            return np.frombuffer(base64.b64decode(given, validate=True), "<f4")
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"is not a vector of float32 in base64 ({error})") from error
    return np.asarray(given, "<f4")


def _text_from_vector(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")


Vector = Annotated[
    NDArray[np.float32], BeforeValidator(_vector_from_text), PlainSerializer(_text_from_vector)
]
"""float32[K]; little-endian base64 in the file, so that it comes back bit for bit."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Smoothing(_Record):
    """How an activation is reshaped before it is quantized: X' = (X - shift) / scale.

    Attributes:
        alpha: of SmoothQuant, None where scales are 1.
        shift: float32[K].
        scale: float32[K].
        error: squared error of the layers' outputs relative to their variance, on a sample.
        error_before: the same without smoothing.
    """

    alpha: float | None
    shift: Vector
    scale: Vector
    error: float
    error_before: float


class SiteRecord(_Record):
    """What was found for one activation.

    Attributes:
        threshold: magnitude that becomes 127, after smoothing.
        largest: largest magnitude that was seen, after smoothing.
        mean: float32[K]; after smoothing.
        smoothing: None leaves the activation as it is.
    """

    threshold: float = Field(ge=0, allow_inf_nan=False)
    largest: float = Field(ge=0, allow_inf_nan=False)
    mean: Vector
    smoothing: Smoothing | None = None


class AttentionRecord(_Record):
    """What the products of an attention read, once its values are smoothed.

    Attributes:
        query: largest magnitude of the scaled queries.
        key: of the keys.
        value: of the values.
    """

    query: float = Field(ge=0, allow_inf_nan=False)
    key: float = Field(ge=0, allow_inf_nan=False)
    value: float = Field(ge=0, allow_inf_nan=False)


class LayerRecord(_Record):
    """One layer that can be quantized.

    Attributes:
        site: the activation it reads, by the norm that makes it or by the layer itself.
        weight_sha256: of its float32 weight.
    """

    site: str
    weight_sha256: Sha256


class FramesRecord(_Record):
    """The frames a calibration saw.

    Attributes:
        count: how many.
        sha256: of their pixel values, in their order.
    """

    count: int = Field(gt=0)
    sha256: Sha256


class Calibration(_Record):
    """How a tower is to be quantized.

    Attributes:
        schema_version: of this record.
        method: how thresholds were chosen; ``percentile`` and ``entropy`` in older records.
        percentile: of older records; nothing reads it.
        frames: what it was made from.
        sites: the activations, by name.
        layers: every layer that can be quantized, by its module.
        attentions: what FP8 quantizes beside them, by module; none in older records.
        excluded: layers that stay in floating point.
        notes: what a search or a person wants to be remembered, such as the gate it met.
        agreement: with float32 on frames that nothing was decided on, by graph; not part of the
            digest, because it is measured on graphs that hold the digest.
    """

    schema_version: int = SCHEMA_VERSION
    method: Literal["max", "mse", "percentile", "entropy"]
    percentile: float = 99.99
    frames: FramesRecord
    sites: dict[str, SiteRecord]
    layers: dict[str, LayerRecord] = Field(min_length=1)
    attentions: dict[str, AttentionRecord] = {}
    excluded: tuple[str, ...] = ()
    notes: dict[str, str] = {}
    agreement: dict[str, MeasuredAgreement] = {}

    @property
    def quantized(self) -> tuple[str, ...]:
        """Layers that become INT8, in the order of the graph."""
        return tuple(name for name in self.layers if name not in self.excluded)

    def digest(self) -> str:
        """Return the sha256 of how it quantizes, for the manifest of a bundle."""
        left_out = {"agreement"} if self.attentions else {"agreement", "attentions"}
        return _checksum(self.model_dump(mode="json", exclude=left_out))

    def excluding(self, layers: tuple[str, ...]) -> Calibration:
        """Return the same calibration with exactly these layers in floating point.

        Raises:
            CalibrationError: one of them is not a layer of it.
        """
        unknown = [name for name in layers if name not in self.layers]
        if unknown:
            raise CalibrationError(
                f"excluded: {', '.join(unknown)} is not among the {len(self.layers)} layers that "
                f"were calibrated, such as {next(iter(self.layers))}."
            )
        ordered = tuple(name for name in self.layers if name in layers)
        return self.model_copy(update={"excluded": ordered})

    def save(self, file: Path) -> None:
        """Write the record with its checksum, completely or not at all.

        Raises:
            CalibrationError: the file cannot be written.
        """
        content = self.model_dump(mode="json")
        with staged_file(file, CalibrationError) as staged:
            text = json.dumps({"checksum": _checksum(content), **content}, indent=1)
            staged.write_text(text + "\n", encoding="utf-8")


def load_calibration(file: Path) -> Calibration:
    """Read a record back.

    Raises:
        CalibrationError: it is missing, damaged, was changed, or is of another version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(
            f"{file} cannot be read ({error.strerror}), expected the JSON that "
            "`python -m calibration.calibrate` writes."
        ) from error
    except ValueError as error:
        raise CalibrationError(
            f"{file} is not JSON ({error}): it is cut short or damaged. {_AGAIN}"
        ) from error
    if not isinstance(content, dict) or "checksum" not in content:
        raise CalibrationError(f"{file} is not a calibration: it has no checksum. {_AGAIN}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CalibrationError(
            f"{file} has schema version {version}, this foveate reads {SCHEMA_VERSION}. {_AGAIN}"
        )
    given = content.pop("checksum")
    if given != (actual := _checksum(content)):
        raise CalibrationError(
            f"{file} was changed after it was written: its checksum is {str(given)[:12]}..., its "
            f"content has {actual[:12]}.... Take the original file, or calibrate again."
        )
    try:
        return Calibration.model_validate(content)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CalibrationError(
            f"{file} does not describe a calibration: {told}. {_AGAIN}"
        ) from None


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
