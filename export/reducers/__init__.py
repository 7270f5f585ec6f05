"""The registry of token reducers. Adding one is one file and one line here.

Outside of Foveate it is one class and one line, before a bundle is built:

    @dataclass(frozen=True)
    class Mine(BudgetReducer):
        name: ClassVar[str] = "mine"
        scoring: ClassVar[Scoring] = Scoring.SELECTED_LAYER

        def __call__(self, tower: TowerOutput) -> Reduced: ...

    REDUCERS[Mine.name] = Mine
    build_bundle(BuildOptions("models/pocket-llava", Path("build/mine"), reducer="mine"))

`examples/own_reducer.py` does it. `export.reducers.selection` has what a reducer chooses patches
with: operators that TensorRT takes too.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, Literal

from engines.errors import OptionError
from export.reducers.base import BudgetReducer, Reducer
from export.reducers.baselines import KeepAll, Random, Uniform
from export.reducers.divprune import DivPrune
from export.reducers.pool import Pool
from export.reducers.prumerge import PruMerge, PruMergePlus
from export.reducers.reduced import Reduced
from export.reducers.scope import Scope
from export.reducers.top_attention import TopAttention
from export.reducers.visionzip import VisionZip

__all__ = [
    "REDUCERS",
    "USUAL_BUDGETS",
    "Budget",
    "BudgetReducer",
    "Reduced",
    "Reducer",
    "make_reducer",
    "reducer_for_budget",
]

Budget = int | Literal["all"]
"""Visual tokens to leave; ``"all"`` means no reduction."""

USUAL_BUDGETS: tuple[Budget, ...] = (64,)

_BUILTIN: tuple[type[Reducer], ...] = (
    *(DivPrune, KeepAll, Pool, PruMerge, PruMergePlus, Random, Scope, TopAttention, Uniform),
    VisionZip,
)
REDUCERS: dict[str, type[Reducer]] = {kind.name: kind for kind in _BUILTIN}
"""Registry name -> reducer; put your own in, under a name of its own."""


def make_reducer(name: str, **options: Any) -> Reducer:
    """Make a reducer from its registry name and its own options.

    Args:
        name: one of `REDUCERS`.
        **options: the fields of that reducer, for example ``dominant=54, contextual=10``.

    Raises:
        OptionError: the name or an option is unknown, missing or out of range; all of the
            problems of a kind are named together.
    """
    kind = _kind_of(name)
    known = {field.name: field for field in fields(kind)}
    problems = [f"no option {option!r}" for option in options if option not in known]
    problems += [
        f"option {field.name!r} is missing"
        for field in known.values()
        if field.default is MISSING and field.name not in options
    ]
    if problems:
        raise OptionError(f"reducer {name}: {'; '.join(problems)}. It takes {', '.join(known)}.")
    return kind(**options)


def reducer_for_budget(name: str, tokens: int | None, patches: int, **given: Any) -> Reducer:
    """Make the reducer that leaves ``tokens`` of ``patches`` tokens.

    VisionZip splits the budget 27 : 5 into dominant and contextual tokens unless told otherwise.

    Args:
        name: one of `REDUCERS`.
        tokens: how many tokens to leave; None where ``given`` (or the reducer ``none``) says it.
        patches: how many the tower has.
        **given: options that take precedence over those the budget implies.

    Raises:
        OptionError: as `make_reducer`; or the budget is not met, or is larger than the patches.
    """
    if tokens is not None and tokens < 1:
        raise OptionError(f"reducer {name}: {tokens} tokens asked for, expected 1 or more.")
    reducer = make_reducer(name, **_kind_of(name).options_for(tokens, given))
    count = reducer.token_count(patches)
    if tokens is not None and count != tokens:
        raise OptionError(
            f"reducer {name}: {tokens} tokens asked for, but its options "
            f"({', '.join(f'{k}={v}' for k, v in reducer.options.items())}) leave {count}"
            f" of {patches} patches. Leave one of the two out."
        )
    return reducer


def _kind_of(name: str) -> type[Reducer]:
    if name not in REDUCERS:
        close = get_close_matches(name, REDUCERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"reducer {name!r} is not one of {', '.join(sorted(REDUCERS))}.{hint}")
    return REDUCERS[name]
