"""Where the error comes in: the report names the stage that was damaged, NaN or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.errors import CheckpointError
from engines.option_groups import spread
from export.verify import VerifyOptions, command, verify_bundles
from export.verify.report import CandidateReport
from tests.tiny_language import tiny_llava, write_checkpoint
from tests.verified_bundles import change_weight, rewrite_bundle

main = spread(command.main)


def larger(values: np.ndarray) -> np.ndarray:
    return values * np.float32(1.05)


def with_nan(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[3] = np.nan
    return values


def swap_patches(values: np.ndarray) -> np.ndarray:
    values[..., [4, 10], :] = values[..., [10, 4], :]  # row 0 is the class token
    return values


@pytest.fixture
def verify(verified_bundle, language_checkpoint, photographs, tmp_path):
    def run(change, source: Path = verified_bundle, **changes: object) -> CandidateReport:
        damaged = rewrite_bundle(source, tmp_path / "damaged", change)
        fields: dict[str, object] = {"vision_only": True, "max_images": 2, "threads": 1}
        fields |= {"engines": ("ort",)}
        options = VerifyOptions(
            (damaged,), photographs, str(language_checkpoint), **fields | changes
        )
        return verify_bundles(options).candidates[0]

    return run


@pytest.mark.parametrize(
    ("module", "change", "stage"),
    [
        ("tower.embeddings.patch_embedding", larger, "embeddings"),
        ("tower.embeddings.position_embedding", swap_patches, "embeddings"),
        ("tower.layers.0.attention.out_proj", larger, "layer 0"),
        ("tower.layers.1.mlp.fc2", larger, "layer 1"),
        ("tower.layers.1.attention.q_proj", larger, "layer 1"),
        ("projector.linear_2", larger, "projector"),
    ],
)
def test_the_first_divergence_is_where_the_damage_is(verify, module, change, stage):
    candidate = verify(change_weight(module, change))
    assert not candidate.passed
    assert candidate.first_divergence == stage
    errors = {one.stage: one for one in candidate.stages}
    assert errors[stage].worst > 1e-4
    before = list(errors)[: list(errors).index(stage)]
    assert all(errors[name].worst < 1e-5 for name in before)


def test_prumerges_scores_diverge_before_its_selection(verify, prumerge_bundle):
    damage = change_weight("tower.scores.k_proj", larger, "prumerge.onnx")
    candidate = verify(damage, source=prumerge_bundle)
    assert candidate.first_divergence == "scores"
    stages = [one.stage for one in candidate.stages]
    assert stages.index("scores") < stages.index("selection") < stages.index("merging")


def test_the_stage_that_adds_most_is_named(verify):
    change = change_weight("tower.layers.1.mlp.fc2", lambda values: values * np.float32(3.0))
    candidate = verify(change)
    assert candidate.largest_growth == candidate.first_divergence == "layer 1"


def test_nan_names_its_stage_and_crashes_nothing(verify, capsys):
    candidate = verify(change_weight("tower.layers.1.mlp.fc1", with_nan), vision_only=False)
    assert not candidate.passed
    assert candidate.first_divergence == candidate.largest_growth == "layer 1"
    assert candidate.failures[0] == (
        "layer 1 is the first stage with NaN or infinity, in astronaut.png, chelsea.png"
    )
    assert any(line.startswith("logits_cosine is nan") for line in candidate.failures)
    assert candidate.summary["equal_answers"] == 0.0


def test_nan_in_json_is_null(verified_bundle, language_checkpoint, photographs, tmp_path, capsys):
    change = change_weight("projector.linear_1", with_nan)
    damaged = rewrite_bundle(verified_bundle, tmp_path / "damaged", change)
    code = main(
        bundles=[damaged],
        model=str(language_checkpoint),
        images=photographs,
        vision_only=True,
        max_images=1,
        as_json=True,
    )
    (candidate,) = json.loads(capsys.readouterr().out)["candidates"]
    assert code == 1
    assert candidate["first_divergence"] == "projector"
    assert candidate["summary"]["relative"] is None


def test_nan_in_the_checkpoint_is_told_from_nan_in_the_bundle(
    verified_bundle, photographs, tmp_path
):
    model = tiny_llava()
    weights = dict(model.named_parameters())
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    weights[name].data[0, 0] = float("nan")
    checkpoint = write_checkpoint(tmp_path / "tiny-llama", model)
    options = VerifyOptions(
        (verified_bundle,), photographs, str(checkpoint), vision_only=True, max_images=1
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.fc1\.weight holds NaN"):
        verify_bundles(options)


def test_stages_can_be_left_out(verify):
    candidate = verify(lambda root: None, stages=False)
    assert candidate.passed
    assert [one.stage for one in candidate.stages] == ["selection", "projector"]
