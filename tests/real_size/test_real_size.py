"""A LLaVA-1.5-7B in its real size, as a user builds and asks it; hours on a small machine.

`make test-real-size` writes 14 GB of random weights below `$TMPDIR` (or build/), builds bundles of
them, asks, and adds what it measured to `real-size.jsonl` in the same place. Everything else that
it wrote is deleted at the end. `FOVEATE_REAL_SIZE=13b` takes the 13B model.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from engines.option_groups import one_of
from tests.photographs import load_photographs
from tests.real_size.random_llava import Size, write_random_llava
from tests.real_size.watched_run import Measured, run_watched

pytestmark = pytest.mark.real_size

MOST_BYTES = 12e9
MOST_BYTES_OF_VERIFY = 14e9
"""The goal is 12e9; the bundle, the checkpoint's tower and one of its layers are held at once."""
SIZE: Size = one_of("FOVEATE_REAL_SIZE", os.environ.get("FOVEATE_REAL_SIZE", "7b"), Size)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    folder = Path(os.environ.get("TMPDIR", "build")) / "real-size"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    return write_random_llava(place / f"llava-{SIZE}", SIZE)


@pytest.fixture(scope="module")
def picture(place: Path) -> Path:
    file = place / "astronaut.png"
    Image.fromarray(load_photographs()["astronaut.png"]).save(file)
    return file


def note(place: Path, step: str, measured: Measured, **more: object) -> None:
    line = {
        "step": step,
        "model": SIZE,
        "minutes": round(measured.seconds / 60, 1),
        "resident_gb": round(measured.resident_bytes / 1e9, 1),
        "private_gb": round(measured.private_bytes / 1e9, 1),
        "disk_gb": round(measured.disk_bytes / 1e9, 1),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[1], 1),
        "date": time.strftime("%Y-%m-%d"),
        **more,
    }
    with (place / "real-size.jsonl").open("a", encoding="utf-8") as stream:
        print(json.dumps(line), file=stream)
    print(line)


@pytest.mark.parametrize("backend", ["ort", "llamacpp"])
def test_a_bundle_for_the_cpu_is_built_and_asked(
    place: Path, picture: Path, checkpoint: Path, backend: str
) -> None:
    if backend == "llamacpp" and find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python: run `make test-llamacpp`")
    bundle = place / f"cpu-{backend}"
    built = run_watched(
        "export.build", "--model", checkpoint, "--tokens", "16,64,all", "--llm-backend", backend,
        "--out", bundle, "--json", folder=place,
    )  # fmt: skip
    report = json.loads(built.stdout)
    stays = sum(report["bytes"].values())
    note(place, f"build {backend}", built, bundle_gb=round(stays / 1e9, 2), told=report["seconds"])
    assert built.private_bytes <= MOST_BYTES
    for tokens in (64, 16, 64, 576):
        asked = run_watched(
            "runtime.ask", bundle, picture, "What is in the picture?", "--visual-tokens", tokens,
            "--max-tokens", "32", "--json", folder=place,
        )  # fmt: skip
        answer = json.loads(asked.stdout)
        spent = answer["milliseconds"]
        first = spent["preprocess"] + spent["encode"] + spent["prefill"]
        note(
            place,
            f"ask {backend} {tokens}",
            asked,
            load_s=round(spent["load"] / 1e3, 1),
            first_token_s=round(first / 1e3, 2),
            tokens_s=answer["answer_tokens_per_second"],
            answer_tokens=answer["answer_tokens"],
        )
        assert answer["answer_tokens"] > 0
        assert asked.private_bytes <= MOST_BYTES
    verify(place, picture, checkpoint, bundle)
    if backend == "ort":
        calibrate(place, bundle)
    shutil.rmtree(bundle)


def verify(place: Path, picture: Path, checkpoint: Path, bundle: Path) -> None:
    """Compare one picture and two words of the answer; random weights forgive little of INT4."""
    compared = run_watched(
        "export.verify", bundle, "--model", checkpoint, "--images", picture, "--tokens", 64,
        "--engine", "ort", "--max-tokens", "2", "--min-logits-cosine", "0.5", "--json",
        folder=place,
    )  # fmt: skip
    (side,) = json.loads(compared.stdout)["candidates"]
    note(place, f"verify {bundle.name}", compared, **side["summary"])
    assert compared.private_bytes <= MOST_BYTES_OF_VERIFY


def calibrate(place: Path, bundle: Path) -> None:
    """Make it INT8 on 128 windows of photographs; random weights would not pass a gate."""
    frames, out = place / "frames", place / "int8"
    frames.mkdir()
    photographs = list(load_photographs().values())
    for number in range(128):
        photograph = photographs[number % len(photographs)]
        side = min(photograph.shape[:2]) * (8 + number // len(photographs)) // 24
        Image.fromarray(photograph[:side, :side]).save(frames / f"{number:03}.png")
    made = run_watched(
        "calibration.calibrate", bundle, "--frames", frames, "--out", out, "--json",
        "--gate", "overlap=0,cosine=0,worst=0,merged=0", folder=place,
    )  # fmt: skip
    said = json.loads(made.stdout)
    note(place, "calibrate int8", made, frames=said["coverage"]["frames"])
    assert made.private_bytes <= MOST_BYTES
    shutil.rmtree(out)


def test_a_bundle_for_a_jetson_is_built(place: Path, checkpoint: Path) -> None:
    bundle = place / "jetson-orin"
    built = run_watched(
        "export.build", "--model", checkpoint, "--target", "jetson-orin", "--tokens", "64",
        "--out", bundle, "--json", folder=place,
    )  # fmt: skip
    note(place, "build jetson-orin", built)
    assert built.private_bytes <= MOST_BYTES
    shutil.rmtree(bundle)
