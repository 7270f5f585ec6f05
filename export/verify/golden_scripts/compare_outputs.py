"""Polygraphy's `--compare-func-script`: compare what was kept, then the tokens made of the same.

Enters: two results of the vision graph, one of them PyTorch's. Leaves: a verdict for each output.
An element-wise comparison says nothing here: one patch kept more or less shifts every token after
it. The limits are in `limits.json` beside this file. Needs NumPy only.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

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


def _picture(result: Mapping[str, Array], at: int) -> dict[str, Array]:
    count = int(result["valid_count"][at])
    return {
        "tokens": np.asarray(result["visual_tokens"][at][:count], np.float64),  # [valid, D]
        "origin": np.asarray(result["patch_index"][at][:count]),  # [valid]
        "assignment": np.asarray(result["assignment"][at]),  # [P]
    }


def _problems(
    reference: dict[str, Array], candidate: dict[str, Array], limits: dict[str, float]
) -> list[tuple[str, str]]:
    kept, also = (set(one["origin"].tolist()) - {-1} for one in (reference, candidate))
    overlap = len(kept & also) / len(kept | also) if kept | also else 1.0
    theirs, ours = _contents(reference), _contents(candidate)
    pairs = [(at, ours[key]) for key, at in theirs.items() if key in ours]
    a = reference["tokens"][[at for at, _ in pairs]]
    b = candidate["tokens"][[at for _, at in pairs]]
    measures = [
        ("patch_index", "overlap of kept patches", overlap, limits["overlap"]),
        (
            "assignment",
            "share of dropped patches merged alike",
            _merged_alike(reference, candidate, kept | also),
            limits["assignment"],
        ),
        ("visual_tokens", "least cosine of matched tokens", _least_cosine(a, b), limits["cosine"]),
    ]
    problems = [
        (output, f"{what} is {value:.6g}, expected at least {least:g}")
        for output, what, value, least in measures
        if not value >= least
    ]
    scale = float(np.abs(a).max(initial=0.0)) or 1.0
    relative = float(np.abs(a - b).max(initial=0.0)) / scale
    if not relative <= limits["relative"]:
        most = limits["relative"]
        told = f"largest relative difference is {relative:.6g}, expected at most {most:g}"
        problems.append(("visual_tokens", told))
    flips = abs(len(reference["origin"]) - len(candidate["origin"]))
    room = round((1.0 - limits["overlap"]) * len(reference["origin"]))
    if flips > room:
        problems.append(("valid_count", f"differs by {flips}, expected at most {room}"))
    return problems


def _contents(picture: dict[str, Array]) -> dict[Hashable, int]:
    """Return where each token is, by its patch or by what became it and what was merged into it."""
    members: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for patch, slot in enumerate(picture["assignment"].tolist()):
        if slot != -1:
            members[slot if slot >= 0 else -slot - 2].append((patch, slot >= 0))
    seen: Counter[Hashable] = Counter()
    places: dict[Hashable, int] = {}
    for at, patch in enumerate(picture["origin"].tolist()):
        content: Hashable = patch if patch >= 0 else tuple(members[at])
        places[content, seen[content]] = at
        seen[content] += 1
    return places


def _places(origin: Array) -> dict[tuple[int, int], int]:
    """Return where each token is: by its patch, or by its number among those without one."""
    places: dict[tuple[int, int], int] = {}
    merged = 0
    for at, patch in enumerate(origin.tolist()):
        places[(patch, merged if patch < 0 else 0)] = at
        merged += patch < 0
    return places


def _merged_alike(
    reference: dict[str, Array], candidate: dict[str, Array], kept: set[int]
) -> float:
    goes = []
    for one in (reference, candidate):
        keys = {slot: key for key, slot in _places(one["origin"]).items()}
        assignment = one["assignment"]
        slots = np.where(assignment < -1, -assignment - 2, assignment)
        goes.append([keys.get(slot) for slot in slots.tolist()])
    dropped = [patch for patch in range(len(goes[0])) if patch not in kept]
    return sum(goes[0][at] == goes[1][at] for at in dropped) / len(dropped) if dropped else 1.0


def _least_cosine(a: Array, b: Array) -> float:
    """Return the least cosine of the rows; NaN where there is one, 0 where there are no rows."""
    if not len(a):
        return 0.0
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.where(lengths == 0, 1.0, lengths)
    return float(np.where(a.any(axis=1) | b.any(axis=1), cosine, 1.0).min())
