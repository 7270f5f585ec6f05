"""Verification: a faithful bundle passes, a damaged one does not, and mistakes are explained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.bundle import open_bundle
from engines.errors import BundleError, EngineError, FoveateError, OptionError, PictureError
from engines.option_groups import spread
from export.verify import VerifyOptions, command, verify_bundles
from export.verify.sides import find_checkpoint
from export.verify.tolerances import Tolerances, tolerances_for
from tests.verified_bundles import change_weight, put_fp16, rewrite_bundle

main = spread(command.main)


def options(bundle: Path, model: Path, images: Path, **changes: object) -> VerifyOptions:
    fields = {"max_tokens": 6, "threads": 1, "max_images": 2, "engines": ("ort",)}
    return VerifyOptions(bundles=(bundle,), model=str(model), images=images, **fields | changes)


def perturb(values: np.ndarray) -> np.ndarray:
    values[:4] += 0.5
    return values


def perturb_embeddings(root: Path) -> None:
    file = root / "llm" / "embeddings.safetensors"
    rows = load_file(file)["embed_tokens"]
    save_file({"embed_tokens": np.roll(rows, 7, axis=0)}, file)


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_faithful_bundle_passes(verified_bundle, language_checkpoint, photographs, tokens):
    report = verify_bundles(
        options(verified_bundle, language_checkpoint, photographs, tokens=tokens, max_images=None)
    )
    (candidate,) = report.candidates
    assert report.passed, candidate.failures
    assert [p.file for p in candidate.pictures] == [
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.png",
    ]
    assert candidate.summary["absolute"] <= 1e-4
    assert candidate.summary["overlap"] == candidate.summary["assignment"] == 1.0
    assert candidate.summary["logits_cosine"] > 0.99999
    assert candidate.summary["equal_answers"] == 1.0
    assert all(p.tokens == (tokens, tokens) for p in candidate.pictures)


def test_an_adaptive_reducer_passes(prumerge_bundle, language_checkpoint, photographs):
    report = verify_bundles(
        options(
            prumerge_bundle, language_checkpoint, photographs, vision_only=True, max_images=None
        )
    )
    (candidate,) = report.candidates
    assert report.passed, candidate.failures
    assert candidate.summary["absolute"] <= 1e-4
    assert "logits_cosine" not in candidate.summary
    assert candidate.precision == {"vision": "fp32"}
    assert {"embeddings", "layer 1", "scores", "keys"} <= {s.stage for s in candidate.stages}


def test_bundles_and_engines_stand_side_by_side(
    verified_bundle, language_checkpoint, photographs, tmp_path
):
    pytest.importorskip("openvino")
    half = rewrite_bundle(verified_bundle, tmp_path / "half", put_fp16(verified_bundle))
    report = verify_bundles(
        VerifyOptions(
            bundles=(verified_bundle, half),
            model=str(language_checkpoint),
            images=photographs,
            engines=("ort", "openvino"),
            max_tokens=3,
            max_images=2,
            threads=1,
        )
    )
    assert report.passed, [candidate.failures for candidate in report.candidates]
    names = [candidate.name for candidate in report.candidates]
    assert names == ["bundle, ort", "bundle, openvino", "half, ort", "half, openvino"]
    assert [c.precision["vision"] for c in report.candidates] == ["fp32", "fp32", "fp16", "fp16"]
    assert report.candidates[1].provider.startswith("OpenVINO")
    errors = [{s.stage: s.worst for s in c.stages} for c in report.candidates]
    assert all(len(one) == 8 for one in errors)  # embeddings, 2 layers, scores, keys and the rest
    assert errors[0]["layer 1"] < 1e-5 < errors[2]["layer 1"] < 1e-2
    assert errors[1]["layer 1"] < 1e-5


def test_the_targets_own_engine_is_left_out_with_a_word(
    verified_bundle, language_checkpoint, photographs, tmp_path
):
    change = {"target": "jetson-orin"}
    bundle = rewrite_bundle(verified_bundle, tmp_path / "jetson", lambda root: change)
    notes: list[str] = []
    given = options(bundle, language_checkpoint, photographs, vision_only=True, engines=())
    report = verify_bundles(given, note=notes.append)
    assert [candidate.engine for candidate in report.candidates] == ["ort"]
    (note,) = notes
    assert "is not compared on tensorrt, its target's engine" in note
    with pytest.raises(EngineError):
        verify_bundles(
            options(bundle, language_checkpoint, photographs, engines=("tensorrt",)),
        )


def test_a_perturbed_vision_weight_fails(
    verified_bundle, language_checkpoint, photographs, tmp_path, capsys
):
    change = change_weight("tower.layers.0.attention.v_proj", perturb)
    damaged = rewrite_bundle(verified_bundle, tmp_path / "damaged", change)
    code = main(
        bundles=[damaged],
        model=str(language_checkpoint),
        images=photographs,
        vision_only=True,
        max_images=2,
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out)
    (candidate,) = document["candidates"]
    assert code == 1
    assert not document["passed"]
    assert not candidate["passed"]
    assert any(f.startswith("relative is") for f in candidate["failures"])
    assert candidate["summary"]["relative"] > 1e-3
    assert candidate["pictures"][0]["answer"] is None


def test_perturbed_embeddings_fail(
    verified_bundle, language_checkpoint, photographs, tmp_path, capsys
):
    damaged = rewrite_bundle(verified_bundle, tmp_path / "damaged", perturb_embeddings)
    code = main(
        bundles=[damaged],
        model=str(language_checkpoint),
        images=photographs,
        max_images=1,
        max_tokens=6,
    )
    told = " ".join(capsys.readouterr().out.split())
    assert code == 1
    assert "damaged, ort differs from tiny-llama: logits_cosine is" in told
    assert "expected at least 0.9999" in told
    assert "relative is" not in told


def test_json_is_one_object(verified_bundle, language_checkpoint, photographs, capsys):
    code = main(
        bundles=[verified_bundle],
        model=str(language_checkpoint),
        images=photographs / "coffee.png",
        max_tokens=3,
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out)
    (candidate,) = document["candidates"]
    assert code == 0
    assert document["passed"]
    assert candidate["passed"]
    assert candidate["reducer"] == {
        "name": "visionzip",
        "tokens": 8,
        "dominant": 7,
        "contextual": 1,
        "merge": "mean",
    }
    (picture,) = candidate["pictures"]
    assert picture["visual_tokens"]["overlap"] == 1.0
    assert picture["answer"]["equal"]
    assert picture["answer"]["bundle"] == picture["answer"]["reference"]
    assert candidate["tolerances"]["overlap"] == 1.0
    assert [s["stage"] for s in candidate["stages"]][:3] == ["embeddings", "layer 0", "layer 1"]


def test_a_tolerance_can_be_set(verified_bundle, language_checkpoint, photographs, capsys):
    common = {"bundles": [verified_bundle], "model": str(language_checkpoint), "max_images": 1}
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
        (OptionError, "--engine orrt: expected one of", right, {"engines": ("orrt",)}),
    ]
    for kind, says, paths, changes in cases:
        with pytest.raises(kind, match=says):
            verify_bundles(options(*paths, **changes))


def test_bundles_that_do_not_belong_together(verified_bundle, photographs, tmp_path):
    other = rewrite_bundle(verified_bundle, tmp_path / "other", lambda root: {"model": "other"})
    with pytest.raises(OptionError, match=r"built from different checkpoints: .* from tiny-llama"):
        verify_bundles(VerifyOptions((verified_bundle, other), photographs))
    with pytest.raises(OptionError, match="is named more than once"):
        verify_bundles(VerifyOptions((other, other), photographs))
    with pytest.raises(OptionError, match="No bundle is named"):
        verify_bundles(VerifyOptions((), photographs))


def test_the_checkpoint_is_found_by_the_name_the_bundle_records(
    verified_bundle, language_checkpoint, photographs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = VerifyOptions((verified_bundle,), photographs, vision_only=True, max_images=1)
    with pytest.raises(OptionError, match="built from tiny-llama, which is neither here nor in mo"):
        verify_bundles(given)
    shutil.copytree(language_checkpoint, tmp_path / "models" / "tiny-llama")
    assert verify_bundles(given).passed
    named = {"model": "llava-hf/llava-1.5-7b-hf"}
    bundle = rewrite_bundle(verified_bundle, tmp_path / "hub", lambda root: named)
    assert find_checkpoint([open_bundle(bundle)]) == "llava-hf/llava-1.5-7b-hf"


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
    assert tolerances_for("fp16", None).stage > exact.stage
    assert tolerances_for("int8", "int4").relative > tolerances_for("fp16", "int4").relative
