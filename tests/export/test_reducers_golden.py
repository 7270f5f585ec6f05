"""The released implementations' own numbers, batch 1 to 4, in PyTorch and in ONNX Runtime."""

import pytest
import torch

from tests.export.reducer_cases import GOLDEN_NAMES, run_onnx, stack, tower_from_golden

TOLERANCE = 1e-4


def test_all_golden_files_are_here():
    assert len(GOLDEN_NAMES) == 17


@pytest.mark.parametrize("runs_in", ["pytorch", "onnxruntime"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name, runs_in):
    one, reducer, case = tower_from_golden(name)
    for batch in (1, 2, 3, 4):
        tower, rows = stack(one, batch)
        out = reducer(tower) if runs_in == "pytorch" else run_onnx(reducer, tower)
        expected = case["tokens"][rows]
        real = expected.shape[1]
        assert out.valid.tolist() == [real] * batch
        assert (out.tokens[:, :real] - expected).abs().max() <= TOLERANCE
        assert not out.tokens[:, real:].any()
        if "kept_indices" in case:
            kept = case["kept_indices"][rows]
            assert torch.equal(out.origin[:, : kept.shape[1]] + 1, kept)
        if "kept_patches" in case:
            assert torch.equal(out.origin, case["kept_patches"][rows])
        if "picked_in_order" in case:
            picked = case["picked_in_order"][rows]
            assert torch.equal(out.origin.gather(1, out.order.argsort(dim=1)), picked)


@pytest.mark.parametrize("name", [name for name in GOLDEN_NAMES if "prumerge" in name])
def test_prumerge_fits_a_budget_of_exactly_what_is_kept(name):
    tower, reducer, case = tower_from_golden(name)
    exact = type(reducer)(budget=case["tokens"].shape[1])(tower)
    assert (exact.tokens - case["tokens"]).abs().max() <= TOLERANCE
