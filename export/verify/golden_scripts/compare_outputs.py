"""Polygraphy's `--compare-func-script`: compare what was kept, then the tokens made of the same.

An element-wise comparison says nothing here: one patch kept more or less shifts every token after
it. The limits are in `limits.json` beside this file, and the measure is Foveate's own, which a
golden run copies beside it. Needs NumPy only.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from calibration.agreement.token_metrics import compare_visual_tokens

GOLDEN = "pytorch"
"""The runner's name that PyTorch's results carry."""


def compare_outputs(first: Any, second: Any) -> OrderedDict[str, bool]:
    """Compare two results, in any order.

    Args:
        first: Polygraphy's `IterationResult`, a mapping from outputs to arrays.
        second: the other.

    Returns:
        For each output whether it is within its limit.
    """
    limits = json.loads(Path(__file__).with_name("limits.json").read_text("utf-8"))
    swapped = getattr(first, "runner_name", "") == GOLDEN
    reference, candidate = (first, second) if swapped else (second, first)
    verdicts = OrderedDict((name, True) for name in limits["outputs"])
    for at in range(len(reference["valid_count"])):
        for output, problem in _problems(_picture(reference, at), _picture(candidate, at), limits):
            verdicts[output] = False
            print(f"{output}: {problem}")
    return verdicts


def _picture(result: Mapping[str, Any], at: int) -> Any:
    """Return one picture of a result, with the fields of `runtime.vision.VisualTokens`."""
    one = slice(at, at + 1)
    return SimpleNamespace(
        tokens=result["visual_tokens"][one],  # [1, N, D]
        valid=result["valid_count"][one],  # [1]
        origin=result["patch_index"][one],  # [1, N]
        assignment=result["assignment"][one],  # [1, P]
    )


def _problems(reference: Any, candidate: Any, limits: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return (output, what is past its limit) of one picture."""
    found = compare_visual_tokens(reference, candidate)
    relative, count = found.difference.max_relative, int(reference.valid[0])
    flips = abs(count - int(candidate.valid[0]))
    room = round((1.0 - limits["overlap"]) * count)
    measures = [
        ("patch_index", "overlap of kept patches", found.overlap, "overlap"),
        ("assignment", "share of dropped patches merged alike", found.assignment, "assignment"),
        ("visual_tokens", "least cosine of matched tokens", found.cosine, "cosine"),
    ]
    problems = [
        (output, f"{what} is {value:.6g}, expected at least {limits[limit]:g}")
        for output, what, value, limit in measures
        if not value >= limits[limit]
    ]
    if not relative <= limits["relative"]:
        most = limits["relative"]
        told = f"largest relative difference is {relative:.6g}, expected at most {most:g}"
        problems.append(("visual_tokens", told))
    if flips > room:
        problems.append(("valid_count", f"differs by {flips}, expected at most {room}"))
    return problems
