"""What a build is predicted to take, and the refusal where a machine has less."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.cli import make_app
from engines.errors import OptionError
from engines.manifest import Precision
from export.build import cost as cost_module
from export.build.command import main
from export.build.cost import predict_cost, refuse_what_cannot_fit
from export.checkpoint.weights import LlavaWeights, Part
from export.language.language_models import DecoderOptions


class HeadersOf7B(LlavaWeights):
    """A LLaVA-1.5-7B of which only the headers are at hand."""

    def shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one part's tensors."""
        if part is not Part.LANGUAGE_MODEL:
            return {part.value: (300_000_000,) if part is Part.VISION_TOWER else (21_000_000,)}
        layers = {
            f"layers.{number}.{name}": shape
            for number in range(32)
            for name, shape in {
                "q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
                "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008),
            }.items()
        }  # fmt: skip
        return layers | {"model.embed_tokens.weight": (32064, 4096), "lm_head": (32064, 4096)}


WEIGHTS = HeadersOf7B(Path(), {})
ORT = DecoderOptions()
LLAMACPP = DecoderOptions(("llamacpp",))


def test_a_7b_fits_a_machine_with_16_gb() -> None:
    cost = predict_cost(WEIGHTS, "fp32", 2, ORT)
    assert 4e9 < cost.memory_bytes < 10e9
    assert 5e9 < cost.bundle_bytes < 7e9
    assert cost.disk_bytes == cost.bundle_bytes
    assert 60 < cost.seconds < 1800


def test_calibration_is_told_by_its_frames() -> None:
    def seconds(precision: Precision, frames: int, graphs: int = 1) -> float:
        cost = predict_cost(WEIGHTS, precision, graphs, ORT, frames)
        return next(step.seconds for step in cost.steps if step.name == "int8")

    assert seconds("int8", 0) < seconds("int8", 64) < seconds("int8", 128) < seconds("mixed", 128)
    assert seconds("int8", 128) < seconds("int8", 128, graphs=3)
    exact, int8 = (predict_cost(WEIGHTS, one, 1, ORT, 128) for one in ("fp32", "int8"))
    assert int8.bundle_bytes < exact.bundle_bytes
    assert max(step.temporary_bytes for step in int8.steps) > 4e9


def test_llama_cpp_needs_room_for_a_float16_copy() -> None:
    cost = predict_cost(WEIGHTS, "fp32", 1, LLAMACPP)
    assert cost.disk_bytes - cost.bundle_bytes == pytest.approx(13.2e9, rel=0.03)


def test_too_little_memory_is_refused_and_what_helps_is_named(tmp_path: Path) -> None:
    cost = predict_cost(WEIGHTS, "fp32", 1, DecoderOptions(precision="fp32"))
    with pytest.raises(OptionError, match=r"needs about \d.* and 0.5 GB are available") as told:
        refuse_what_cannot_fit(cost, tmp_path / "bundle", DecoderOptions(), room=500_000_000)
    assert "the step 'vision'" in str(told.value) and "the bundle can be copied" in str(told.value)


@pytest.mark.parametrize(
    ("decoders", "helps"),
    [
        (ORT, "--llm-backend llamacpp"),
        (LLAMACPP, "--llm-backend ort"),
        (DecoderOptions(precision="fp32"), "--llm-precision int4"),
    ],
)
def test_too_little_disk_is_refused_and_what_helps_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: DecoderOptions, helps: str
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 0, 10**9)
    monkeypatch.setattr(cost_module.shutil, "disk_usage", lambda _: usage)
    cost = predict_cost(WEIGHTS, "fp32", 1, decoders)
    with pytest.raises(OptionError, match=rf"1\.0 GB are free.*{helps}"):
        refuse_what_cannot_fit(cost, tmp_path / "bundle", decoders, room=10**12)


def test_the_command_tells_and_refuses_before_any_work(
    language_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", str(language_checkpoint), "--out", str(tmp_path / "b"), "--tokens", "8"]
    told = CliRunner().invoke(make_app(main), [*arguments, "--dry-run"])
    assert "  needs         about 2" in told.stdout and "GB of disk" in told.stdout
    monkeypatch.setattr(cost_module, "read_free_memory", lambda: 100_000_000)
    refused = CliRunner().invoke(make_app(main), arguments)
    assert refused.exit_code == 2
    assert "This build would not fit" in refused.stderr
    assert not list(tmp_path.iterdir())
