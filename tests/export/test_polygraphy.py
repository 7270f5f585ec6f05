"""Golden runs: Polygraphy itself takes what is written, and tells a perturbed graph."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.errors import OptionError
from engines.option_groups import spread
from export.verify import VerifyOptions, command
from export.verify.golden_run import write_golden_run
from export.verify.golden_scripts.compare_outputs import compare_outputs

main = spread(command.main)

# Found, not imported: an import here would settle, for every other test of the process, which
# TensorRT library Polygraphy drives.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None, reason="Polygraphy is not installed"
)


@pytest.fixture(scope="session", params=["visionzip", "prumerge"])
def golden(
    request, verified_bundle, prumerge_bundle, language_checkpoint, photographs, tmp_path_factory
) -> Path:
    bundle = {"visionzip": verified_bundle, "prumerge": prumerge_bundle}[request.param]
    folder = tmp_path_factory.mktemp("golden") / request.param
    given = VerifyOptions((bundle,), photographs, str(language_checkpoint), max_images=2)
    write_golden_run(given, folder)
    return folder


def run_line(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the README as written, in an environment that has nothing of ours."""
    scripts = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = scripts + os.pathsep + environment["PATH"]
    return subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def line_of(folder: Path, engine: str) -> str:
    lines = (folder / "README.md").read_text().splitlines()
    return next(line.strip() for line in lines if f"polygraphy run model.onnx --{engine}" in line)


def perturb_graph(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    weight = next(w for w in model.graph.initializer if w.name.endswith("layers.0.mlp.fc2.weight"))
    values = numpy_helper.to_array(weight) * np.float32(1.5)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "model.onnx")


def test_polygraphy_passes_a_faithful_graph_and_fails_a_perturbed_one(golden, tmp_path):
    folder = shutil.copytree(golden, tmp_path / "elsewhere")  # it can be carried to a device
    line = line_of(folder, "onnxrt")
    done = run_line(folder, line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 2/2 iterations" in done.stdout
    perturb_graph(folder)
    done = run_line(folder, line)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "visual_tokens: largest relative difference is" in done.stdout


@pytest.mark.parametrize("golden", ["visionzip"], indirect=True)
def test_the_script_runs_the_same_line(golden):
    done = run_line(golden, "./run.sh onnxrt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert line_of(golden, "onnxrt") in " ".join(done.stdout.split())
    assert run_line(golden, "./run.sh openvino").returncode == 2


@pytest.mark.parametrize("golden", ["visionzip"], indirect=True)
def test_polygraphy_knows_every_flag_of_the_tensorrt_line(golden):
    """Without a GPU it can only write down what it would do."""
    done = run_line(golden, line_of(golden, "trt") + " --gen-script script.py")
    assert done.returncode == 0, done.stderr
    script = (golden / "script.py").read_text()
    (golden / "script.py").unlink()
    assert "strongly_typed=True" in script
    assert "min=[1, 3, 28, 28], opt=[1, 3, 28, 28], max=[1, 3, 28, 28]" in script
    trt = (golden / "run.sh").read_text()
    flags = line_of(golden, "trt").split("--data-loader-script")[0].split("model.onnx ")[1]
    assert flags.strip() in trt


def results(**changes: object) -> dict[str, np.ndarray]:
    made: dict[str, object] = {
        "visual_tokens": np.eye(4, dtype=np.float32)[None],
        "valid_count": np.array([4]),
        "patch_index": np.array([[-1, 2, 5, -1]]),
        "assignment": np.array([[-5, -5, 1, 3, -1, 2]]),
    }
    return {name: np.asarray(value) for name, value in (made | changes).items()}


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """The comparison with limits of its own."""
    limits = {"outputs": list(results()), "overlap": 0.5, "assignment": 0.6, "cosine": 0.9}
    (tmp_path / "limits.json").write_text(json.dumps(limits | {"relative": 0.1}))
    module = sys.modules[compare_outputs.__module__]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "compare_outputs.py"))
    return lambda ours: [
        name for name, good in compare_outputs(ours, results()).items() if not good
    ]


def test_the_comparison_knows_about_selection(compare, capsys):
    assert compare(results()) == []
    moved = np.eye(4, dtype=np.float32)[[0, 2, 1, 3]][None]
    swapped = results(visual_tokens=moved, patch_index=[[-1, 5, 2, -1]])
    assert compare(swapped | {"assignment": np.array([[-5, -5, 2, 3, -1, 1]])}) == []
    assert compare(results(patch_index=[[-1, 5, 2, -1]])) == ["visual_tokens"]
    assert compare(results(patch_index=[[-1, 2, 0, -1]])) == ["patch_index"]
    assert compare(results(assignment=[[-1, -1, 1, 3, -1, 2]])) == ["assignment"]
    assert compare(results(visual_tokens=np.full((1, 4, 4), np.nan))) == ["visual_tokens"]
    assert "least cosine of matched tokens is nan, expected at least 0.9" in capsys.readouterr().out
    only_the_class_token = results(valid_count=[1])
    assert compare(only_the_class_token) == ["valid_count", "patch_index", "assignment"]


def test_the_order_of_the_two_sides_does_not_matter(compare):
    class Golden(OrderedDict):
        runner_name = "pytorch"

    ours = results(visual_tokens=np.eye(4)[None] * 3)
    assert compare_outputs(Golden(results()), ours) == compare_outputs(ours, Golden(results()))


def test_the_command_writes_the_folder_once(
    verified_bundle, language_checkpoint, photographs, tmp_path, capsys
):
    common = {"model": str(language_checkpoint), "images": photographs, "max_images": 1}
    goal = tmp_path / "golden"
    assert main(bundles=[verified_bundle], polygraphy=goal, as_json=True, **common) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == sorted(file.name for file in goal.iterdir())
    assert "golden.json" in files
    with pytest.raises(OptionError, match="is already there"):
        main(bundles=[verified_bundle], polygraphy=goal, **common)
    with pytest.raises(OptionError, match="takes one bundle and got 2"):
        main(bundles=[verified_bundle] * 2, polygraphy=tmp_path / "two", **common)


def test_only_so_many_pictures_are_taken_and_that_is_said(
    verified_bundle, language_checkpoint, photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr("export.verify.golden_run.MOST_PICTURES", 3)
    notes: list[str] = []
    given = VerifyOptions((verified_bundle,), photographs, str(language_checkpoint))
    write_golden_run(given, tmp_path / "golden", notes.append)
    assert notes == ["The first 3 of 4 pictures are taken; see --max-images."]
    assert len(np.load(tmp_path / "golden" / "inputs.npz")["pixel_values"]) == 3
