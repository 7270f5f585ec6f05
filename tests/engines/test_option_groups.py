"""A dataclass of the API as options: what is typed, what is made of it, what keeps its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import typer

from engines.errors import OptionError
from engines.option_groups import Given, Typed, spread


@dataclass(frozen=True)
class Inner:
    """Within; more."""

    deep: Annotated[int, typer.Option("--depth", help="How deep.")] = 3
    hidden: float = 0.5


@dataclass(frozen=True)
class Form:
    """What it must be."""

    words: Annotated[tuple[str, ...], typer.Option(), Typed(lambda text: tuple(text.split(",")))]


@dataclass(frozen=True)
class Outer:
    """Around."""

    kind: Annotated[Literal["a", "b"], typer.Option("--which", help="a or b.")]
    inner: Inner = field(default_factory=lambda: Inner(deep=5, hidden=0.25))
    form: Form | None = None
    plain: str = "kept"


@dataclass(frozen=True)
class Limits:
    """What replaces limits."""

    given: Annotated[Mapping[str, int], Given(Inner)] = field(default_factory=dict)


def made(group: type, **typed: Any) -> Any:
    results: list[Any] = []

    def main(options: Any) -> None:
        results.append(options)

    main.__annotations__["options"] = group
    spread(main)(**typed)
    return results[0]


def test_groups_nest_and_what_is_no_option_keeps_its_default() -> None:
    assert made(Outer, which="b") == Outer("b", Inner(5, 0.25))
    assert made(Outer, which="a", depth=7, words="x,y") == Outer(
        "a", Inner(7, 0.25), Form(("x", "y"))
    )


def test_a_mapping_holds_what_was_given() -> None:
    assert made(Limits) == Limits({})
    assert made(Limits, depth=2) == Limits({"deep": 2})


def test_a_word_that_is_none_of_a_literal_is_refused_by_its_option() -> None:
    with pytest.raises(OptionError, match="--which c: expected one of a, b"):
        made(Outer, which="c")
