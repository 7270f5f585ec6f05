"""INT8 of a checkpoint that cuts pictures into tiles, whole path: build, calibrate, encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.agreement.token_metrics import Gate
from calibration.calibrate import main as calibrate_command
from calibration.int8.bundle import Int8Bundle, calibrate_bundle
from calibration.int8.graphs import RECORD_NAME
from calibration.int8.options import Int8Options
from calibration.int8.report import lines_from_frames, lines_from_int8
from calibration.scales.calibration_file import load_calibration
from engines.bundle import Bundle, open_bundle
from engines.errors import GateError
from export.build import BuildOptions, build_bundle
from export.language.language_models import DecoderOptions
from runtime.vision import VisionEncoder
from tests.photographs import load_photographs
from tests.tiny_tiles import tiny_llava_onevision, write_tiled

ANY = Gate(0.0, 0.0, 0.0, 0.0)
SIZES = ((84, 84), (28, 56), (110, 110), (84, 28))
"""Of 9, 2, 16 and 3 tiles."""


def drive(frames: int) -> list[np.ndarray]:
    photograph = load_photographs()["astronaut.png"]
    starts = np.linspace(0, 390, frames).astype(int)
    sizes = (SIZES[at % len(SIZES)] for at in range(frames))
    return [
        photograph[at : at + height, at : at + width]
        for at, (height, width) in zip(starts, sizes, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drive")
    for number, picture in enumerate(drive(16)):
        Image.fromarray(picture).save(place / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> BuildOptions:
    root = write_tiled(tmp_path_factory.mktemp("onevision") / "tiny", tiny_llava_onevision())
    out = tmp_path_factory.mktemp("bundles") / "fp32"
    return BuildOptions(str(root), out, tokens=(6,), decoders=DecoderOptions(precision="fp32"))


@pytest.fixture(scope="module")
def fp32(build: BuildOptions) -> Bundle:
    build_bundle(build)
    return open_bundle(build.out)


@pytest.fixture(scope="module")
def int8(fp32: Bundle, folder: Path) -> Int8Bundle:
    options = Int8Options(frames=str(folder), gate=ANY)
    return calibrate_bundle(fp32, fp32.root.with_name("int8"), options)


def test_it_is_calibrated_on_squares_and_says_so(int8: Int8Bundle, fp32: Bundle) -> None:
    assert int8.frames is not None
    assert int8.frames.counts[:4] == (5, 3, 5, 4)
    sets = int8.frames.split()
    record = load_calibration(int8.bundle / RECORD_NAME)
    assert record.frames.count == len(sets.calibration) > len(sets.calibration.frames) == 10
    assert int8.made.held_out == len(sets.gate.frames) == 2
    (report,) = int8.made.reports.values()
    assert (report.pictures, report.squares) == (2, len(sets.report))
    told = "\n".join(lines_from_frames(int8.frames) + lines_from_int8(int8.made))
    assert f"{len(int8.frames)} squares of them: of each frame the view of all of it and" in told
    assert f"on {len(sets.report)} squares of 2 frames that nothing was decided on" in told
    assert "worst square" in told
    assert open_bundle(int8.bundle).manifest.tiles == fp32.manifest.tiles


def test_it_encodes_every_proportion_nearly_as_fp32(int8: Int8Bundle, fp32: Bundle) -> None:
    with VisionEncoder(open_bundle(int8.bundle), tokens=6) as ours, VisionEncoder(fp32) as theirs:
        for picture in drive(7)[3:]:
            found, exact = (one.encode([picture]) for one in (ours, theirs))
            patches, expected = (set(one.origin[0].tolist()) for one in (found, exact))
            assert len(patches & expected) / len(patches | expected) > 0.6
            assert not np.array_equal(found.tokens[0, :6], exact.tokens[0, :6])


def test_a_build_gives_the_same_graph_in_one_step(
    int8: Int8Bundle, build: BuildOptions, folder: Path, tmp_path: Path
) -> None:
    options = Int8Options(frames=str(folder), gate=ANY)
    built = build_bundle(
        BuildOptions(
            build.model,
            tmp_path / "int8",
            tokens=build.tokens,
            decoders=build.decoders,
            precision="int8",
            int8=options,
        )
    )
    assert built.frames is not None and int8.frames is not None
    assert built.frames.digest == int8.frames.digest
    (graph,) = open_bundle(built.bundle).manifest.vision
    assert (built.bundle / graph.file).read_bytes() == (int8.bundle / graph.file).read_bytes()


def test_mixed_gives_layers_back_until_the_gate_holds(
    fp32: Bundle, folder: Path, tmp_path: Path
) -> None:
    strict = Gate(overlap=0.0, cosine=0.99999, worst=0.0, merged=0.0)
    options = Int8Options(frames=str(folder), gate=strict)
    made = calibrate_bundle(fp32, tmp_path / "mixed", options, precision="mixed").made
    assert 0 < len(made.calibration.excluded) < len(made.calibration.layers)
    assert all(strict.holds(one) for one in made.agreements.values())


def test_the_command_says_on_how_many_squares_the_gate_was_missed(
    fp32: Bundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Int8Options(frames=str(folder), gate=Gate(1.0, 1.0))
    with pytest.raises(GateError, match=r"on \d+ squares of 2 frames held out"):
        calibrate_bundle(fp32, tmp_path / "out", options)
    assert calibrate_command(fp32.root, tmp_path / "out", options) == 1
    assert "squares of 2 frames held out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
