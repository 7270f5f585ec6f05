"""Verification: a faithful bundle passes, a damaged one does not, and mistakes are explained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

from engines.bundle import open_bundle, write_bundle
from engines.errors import BundleError, FoveateError, OptionError, PictureError
from engines.manifest import ReducerSpec
from export.build import build_bundle
from export.build_plan import BuildOptions
from export.checkpoint import open_checkpoint
from export.reducers import make_reducer
from export.to_onnx import export_onnx
from export.tolerances import Tolerances, tolerances_for
from export.verify import VerifyOptions, find_checkpoint, main, verify_bundle
from export.visual_graph import build_visual_graph
from tests.photographs import load_photographs


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        pixels = load_photographs()[name]
        Image.fromarray(pixels).save(folder / f"{Path(name).stem}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def verified_bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verified") / "bundle"
    build_bundle(
        BuildOptions(str(language_checkpoint), out, tokens=(8, "all"), llm_precision="fp32")
    )
    return out


def options(bundle: Path, model: Path, images: Path, **changes: object) -> VerifyOptions:
    fields = {"max_tokens": 6, "threads": 1, "max_images": 2}
    return VerifyOptions(bundle=bundle, model=str(model), images=images, **fields | changes)


def rewrite_bundle(source: Path, destination: Path, change) -> Path:
    """Publish a copy that `change` has altered; its digests are those of the altered files."""
    bundle = open_bundle(source)
    with write_bundle(destination) as draft:
        for name in bundle.manifest.files:
            if name != "README.md":
                shutil.copy2(source / name, draft.path(name))
        described = change(draft.root)
        draft.describe(bundle.manifest.model_copy(update=described or {}))
    return destination


def perturb_vision_weight(root: Path) -> None:
    (file,) = root.glob("vision/visionzip_*.onnx")
    model = onnx.load(file)
    weight = next(w for w in model.graph.initializer if w.name.endswith("v_proj.weight"))
    values = numpy_helper.to_array(weight).copy()
    values[:4] += 0.5
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, file)


def perturb_embeddings(root: Path) -> None:
    file = root / "llm" / "embeddings.safetensors"
    rows = load_file(file)["embed_tokens"]
    save_file({"embed_tokens": np.roll(rows, 7, axis=0)}, file)


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_faithful_bundle_passes(verified_bundle, language_checkpoint, photographs, tokens):
    report = verify_bundle(
        options(verified_bundle, language_checkpoint, photographs, tokens=tokens, max_images=None)
    )
    assert report.passed, report.failures
    assert [p.file for p in report.pictures] == [
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.png",
    ]
    assert report.summary["absolute"] <= 1e-4
    assert report.summary["overlap"] == 1.0
    assert report.summary["logits_cosine"] > 0.99999
    assert report.summary["equal_answers"] == 1.0
    assert all(p.tokens == tokens for p in report.pictures)
    assert all(p.outputs["assignment"].max_abs == 0 for p in report.pictures)


def test_an_adaptive_reducer_passes(verified_bundle, language_checkpoint, photographs, tmp_path):
    def put_prumerge(root: Path) -> dict[str, object]:
        reducer = make_reducer("prumerge", budget=6)
        graph = build_visual_graph(open_checkpoint(language_checkpoint), reducer)
        exported = export_onnx(graph, root / "vision" / "prumerge.onnx")
        spec = ReducerSpec(name="prumerge", tokens=6, options=reducer.options)
        changes = {
            "file": "vision/prumerge.onnx",
            "reducer": spec,
            "inputs": exported.inputs,
            "outputs": exported.outputs,
        }
        first = open_bundle(verified_bundle).vision()
        return {"vision": (first.model_copy(update=changes), first)}

    bundle = rewrite_bundle(verified_bundle, tmp_path / "bundle", put_prumerge)
    report = verify_bundle(
        options(bundle, language_checkpoint, photographs, vision_only=True, max_images=None)
    )
    assert report.passed, report.failures
    assert report.summary["absolute"] <= 1e-4
    assert "logits_cosine" not in report.summary
    assert report.precision == {"vision": "fp32"}


def test_a_perturbed_vision_weight_fails(
    verified_bundle, language_checkpoint, photographs, tmp_path, capsys
):
    damaged = rewrite_bundle(verified_bundle, tmp_path / "damaged", perturb_vision_weight)
    code = main(
        bundle=damaged,
        model=str(language_checkpoint),
        images=photographs,
        vision_only=True,
        max_images=2,
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out)
    assert code == 1
    assert not document["passed"]
    assert any(f.startswith("relative is") for f in document["failures"])
    assert document["summary"]["relative"] > 1e-3
    assert document["pictures"][0]["answer"] is None


def test_perturbed_embeddings_fail(
    verified_bundle, language_checkpoint, photographs, tmp_path, capsys
):
    damaged = rewrite_bundle(verified_bundle, tmp_path / "damaged", perturb_embeddings)
    code = main(
        bundle=damaged,
        model=str(language_checkpoint),
        images=photographs,
        max_images=1,
        max_tokens=6,
    )
    told = " ".join(capsys.readouterr().out.split())
    assert code == 1
    assert "differs from tiny-llama: logits_cosine is" in told
    assert "expected at least 0.9999" in told
    assert "relative is" not in told


def test_json_is_one_object(verified_bundle, language_checkpoint, photographs, capsys):
    code = main(
        bundle=verified_bundle,
        model=str(language_checkpoint),
        images=photographs / "coffee.png",
        max_tokens=3,
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["passed"]
    assert document["reducer"] == {
        "name": "visionzip",
        "tokens": 8,
        "dominant": 7,
        "contextual": 1,
        "merge": "mean",
    }
    (picture,) = document["pictures"]
    assert set(picture["outputs"]) == {"visual_tokens", "valid_count", "patch_index", "assignment"}
    assert picture["answer"]["equal"]
    assert picture["answer"]["bundle"] == picture["answer"]["reference"]
    assert document["tolerances"]["overlap"] == 1.0


def test_a_tolerance_can_be_set(verified_bundle, language_checkpoint, photographs, capsys):
    common = {"bundle": verified_bundle, "model": str(language_checkpoint), "max_images": 1}
    common |= {"images": photographs, "vision_only": True}
    assert main(**common, max_relative=0.0) == 1
    assert "expected at most 0" in capsys.readouterr().out
    assert main(**common, max_relative=1.0) == 0
    assert "agrees with tiny-llama within tolerance" in capsys.readouterr().out


def test_mistakes_are_explained(
    verified_bundle, language_checkpoint, tiny_checkpoint, photographs, tmp_path
):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.png"
    broken.write_bytes((photographs / "coffee.png").read_bytes()[:5000])
    right = (verified_bundle, language_checkpoint, photographs)
    cases: list[tuple[type[FoveateError], str, tuple[Path, Path, Path], dict[str, object]]] = [
        (OptionError, "does not exist, expected a directory", (*right[:2], tmp_path / "no"), {}),
        (OptionError, "holds no picture, expected files", (*right[:2], tmp_path / "empty"), {}),
        (PictureError, "damaged or truncated", (*right[:2], broken), {"vision_only": True}),
        (BundleError, "not a bundle", (tmp_path, *right[1:]), {}),
        (OptionError, "patches 16 and 64", (verified_bundle, tiny_checkpoint, photographs), {}),
        (OptionError, "It was built from tiny-llama", (right[0], tiny_checkpoint, right[2]), {}),
        (OptionError, "no vision graph with 9", right, {"tokens": 9}),
        (OptionError, "overlap is 2, expected 0 to 1", right, {"tolerances": {"overlap": 2}}),
    ]
    for kind, says, paths, changes in cases:
        with pytest.raises(kind, match=says):
            verify_bundle(options(*paths, **changes))


def test_the_checkpoint_is_found_by_the_name_the_bundle_records(
    verified_bundle, language_checkpoint, photographs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="built from tiny-llama, which is neither here nor in mo"):
        verify_bundle(VerifyOptions(verified_bundle, photographs, vision_only=True))
    shutil.copytree(language_checkpoint, tmp_path / "models" / "tiny-llama")
    assert verify_bundle(
        VerifyOptions(verified_bundle, photographs, vision_only=True, max_images=1)
    ).passed
    assert find_checkpoint("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_the_command_ends_with_2_on_a_mistake(tmp_path):
    command = [sys.executable, "-m", "export.verify", str(tmp_path), "--model", "no/where"]
    done = subprocess.run(
        [*command, "--images", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --images")


def test_tolerances_name_every_measure_past_them():
    limits = Tolerances(relative=0.1, overlap=0.9, cosine=0.9, logits_cosine=0.9)
    summary = {"relative": float("nan"), "overlap": 0.5, "cosine": 0.95, "absolute": 9.0}
    assert limits.failures(summary) == [
        "relative is nan, expected at most 0.1",
        "overlap is 0.5, expected at least 0.9",
    ]
    with pytest.raises(OptionError, match=r"relative is -1, expected 0 or more; cosine is 1\.5"):
        Tolerances(relative=-1, overlap=1, cosine=1.5)


def test_lower_precision_is_given_more_room():
    exact, int4 = tolerances_for("fp32", "fp32"), tolerances_for("fp32", "int4")
    assert exact.equal_answers > int4.equal_answers == 0.0
    assert tolerances_for("fp16", None).overlap < exact.overlap
    assert tolerances_for("int8", "int4").relative > tolerances_for("fp16", "int4").relative
