"""Options of a command that are the fields of a dataclass: the one that the API takes too.

A field annotated with a `typer.Option` is an option of its name; a field without one keeps its
default. A field that is a dataclass, or None, is a group within the group. `Typed` marks a field
that a person types otherwise than the API takes it, `Given` a mapping of what was given of others.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typer.models import OptionInfo, ParameterInfo

from engines.errors import OptionError

_NOTHING = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Typed:
    """How an option is typed.

    Attributes:
        read: makes of it what the field takes; raises an `OptionError`.
        show: makes of the field's default what could be typed for it.
        kind: what is typed.
    """

    read: Callable[[Any], Any]
    show: Callable[[Any], Any] = str
    kind: Any = str


class Given:
    """The options of dataclasses as a mapping that holds those that were given.

    Attributes:
        kinds: the dataclasses.
        names: which of their fields; without any, every one that has an option. Fields of one name
            are one option, the first one's.
    """

    def __init__(self, *kinds: type, names: tuple[str, ...] = ()) -> None:
        self.kinds = kinds
        self.names = names


@dataclasses.dataclass(frozen=True)
class _Option:
    """One field of a group as a command sees it, under the word that is typed for it."""

    field: str
    name: str
    kind: Any
    default: Any
    read: Callable[[Any], Any] | None


def spread(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return ``main`` with the fields of a dataclass in the place of a parameter that is one.

    What is left out when it is called is at its default.
    """
    kinds = get_type_hints(main, include_extras=True)
    groups: dict[str, tuple[Any, Any]] = {}
    parameters = []
    for parameter in inspect.signature(main).parameters.values():
        kind = kinds[parameter.name]
        if dataclasses.is_dataclass(kind):
            groups[parameter.name] = kind, parameter.default
            parameters += [
                (option.name, option.kind, option.default)
                for option in _options_of(kind, parameter.default)
            ]
        else:
            parameters.append((parameter.name, kind, parameter.default))

    def gathered(**options: Any) -> int | None:
        made = {name: _gather(*group, options) for name, group in groups.items()}
        return main(**options, **made)

    only = inspect.Parameter.KEYWORD_ONLY
    gathered.__doc__ = main.__doc__
    gathered.__annotations__ = {name: kind for name, kind, _ in parameters}
    gathered.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, only, default=default, annotation=kind)
            for name, kind, default in parameters
        ]
    )
    return gathered


def _fields(group: Any, defaults: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the annotated type and the default of each field."""
    kinds = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        default = field.default
        if isinstance(defaults, group):
            default = getattr(defaults, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, kinds[field.name], _NOTHING if default is dataclasses.MISSING else default


def _options_of(group: Any, defaults: Any) -> Iterator[_Option]:
    for name, kind, default in _fields(group, defaults):
        if (inner := _group_of(kind)) is not None:
            yield from _options_within(inner, default)
        elif (given := _note(kind, Given)) is not None:
            yield from _options_given(given)
        elif _note(kind, ParameterInfo) is not None:
            yield _option(name, kind, default, group)


def _options_within(group: Any, default: Any) -> Iterator[_Option]:
    """Yield the options of a group in a group; of one that is None by default, all left out."""
    for option in _options_of(group, default):
        kind = _optional(option.kind)
        yield (
            option if default is not None else dataclasses.replace(option, default=None, kind=kind)
        )


def _options_given(given: Given) -> Iterator[_Option]:
    seen: set[str] = set()
    for group in given.kinds:
        for name, kind, _ in _fields(group, None):
            wanted = (not given.names or name in given.names) and name not in seen
            if wanted and _note(kind, ParameterInfo) is not None:
                seen.add(name)
                yield _option(name, _optional(kind), None, group)


def _gather(group: Any, defaults: Any, options: dict[str, Any]) -> Any:
    """Make a group of its options, which are taken out of ``options``."""
    made = {}
    for name, kind, default in _fields(group, defaults):
        if (inner := _group_of(kind)) is not None:
            made[name] = _gather_inner(inner, default, options)
        elif (given := _note(kind, Given)) is not None:
            values = {one.field: _take(one, options) for one in _options_given(given)}
            made[name] = {key: value for key, value in values.items() if value is not None}
        elif _note(kind, ParameterInfo) is not None:
            made[name] = _take(_option(name, kind, default, group), options)
        elif default is not _NOTHING:
            made[name] = default
    return group(**made)


def _gather_inner(group: Any, default: Any, options: dict[str, Any]) -> Any:
    """Make a group in a group; one that is None by default stays so where nothing is given."""
    if default is not None:
        return _gather(group, default, options)
    given = {one.field: _take(one, options) for one in _options_within(group, default)}
    given = {name: value for name, value in given.items() if value is not None}
    return group(**given) if given else None


def _group_of(kind: Any) -> Any:
    """Return the dataclass that a field's type is, or is but for None."""
    parts = [part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)]
    return parts[0] if parts and get_origin(kind) is not Annotated else None


def _optional(kind: Any) -> Any:
    base, *notes = get_args(kind)
    return operator.getitem(Annotated, (base | None, *notes))


def _take(option: _Option, options: dict[str, Any]) -> Any:
    value = options.pop(option.name, option.default)
    return value if option.read is None or value is None else option.read(value)


def _option(name: str, kind: Any, default: Any, group: Any) -> _Option:
    """Return a field as an option under the beginning of its group's docstring."""
    base, *notes = get_args(kind)
    typed = _text_of(name, base, notes)
    if typed is not None:
        base = typed.kind | None if _is_optional(base) or default is None else typed.kind
        if default is not _NOTHING and default is not None:
            default = typed.show(default)
    (panel,) = re.findall("^[^.:;]*", group.__doc__ or "")
    titled = [copy.copy(note) for note in notes if not isinstance(note, Typed)]
    for note in titled:
        if isinstance(note, OptionInfo) and note.rich_help_panel is None:
            note.rich_help_panel = panel
    annotated = operator.getitem(Annotated, (base, *titled))
    read = typed.read if typed is not None else None
    return _Option(name, _word_of(name, notes).replace("-", "_"), annotated, default, read)


def _text_of(name: str, base: Any, notes: list[Any]) -> Typed | None:
    """Return how a field is typed if not as its type; a word of a `Literal` is checked by us."""
    for note in notes:
        if isinstance(note, Typed):
            return note
    (literal,) = [part for part in (base, *get_args(base)) if get_origin(part) is Literal] or [None]
    if literal is None:
        return None
    kind = type(get_args(literal)[0])
    if kind is not str:
        return Typed(kind, kind, kind)
    option = f"--{_word_of(name, notes)}"
    return Typed(lambda word: one_of(option, word, literal))


def _word_of(name: str, notes: list[Any]) -> str:
    """Return what is typed behind the two dashes; Typer keeps the name in ``default``."""
    words = [note.default for note in notes if isinstance(note, OptionInfo)]
    given = words[0] if words and isinstance(words[0], str) else name.replace("_", "-")
    return given.split("/")[0].removeprefix("--")


def _is_optional(base: Any) -> bool:
    return type(None) in get_args(base) and get_origin(base) is not Literal


def _note(kind: Any, wanted: type) -> Any:
    if get_origin(kind) is not Annotated:
        return None
    return next((note for note in get_args(kind)[1:] if isinstance(note, wanted)), None)


def one_of(option: str, value: str, choices: Any) -> Any:
    """Return ``value`` if a `Literal` type has it.

    Raises:
        OptionError: it has not; all that it has are named.
    """
    known = get_args(choices)
    if value not in known:
        raise OptionError(f"{option} {value}: expected one of {', '.join(known)}.")
    return value
