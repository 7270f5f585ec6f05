"""A checkpoint's chat template: code from elsewhere, run in a sandbox that ends.

Enters: Jinja source, and the messages of a conversation. Leaves: the conversation as text, equal to
what transformers renders. Jinja's sandbox keeps a template from everything but the conversation;
here its work is counted as well, because Jinja bounds neither loops nor the length of a text. The
counts are far above what a conversation needs, and no clock is read.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sized,
    ValuesView,
)
from datetime import datetime
from typing import Any

from jinja2 import TemplateAssertionError, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from engines.errors import FoveateError, OptionError

MOST_STEPS = 200_000
"""Turns of loops and calls in one rendering, those of long bodies counted several times."""
MOST_CHARACTERS = 20_000_000
"""Characters that one rendering may look at or make."""
MOST_ITEMS = 1_000_000
"""Items of lists that one rendering may look at or make."""
_MOST_RANGE = 10_000
_MOST_NUMBER = 10_000
_MOST_INDENT = 64
_MOST_BITS = 256
_NODES_PER_STEP = 20

_LEFT_OUT_FILTERS = (
    *("batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "striptags"),
    *("sum", "urlize", "wordwrap", "xmlattr"),
)
_MULTIPLYING = {"indent", "join", "replace", "tojson"}
_TEXT_METHODS = {
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition"),
    *("startswith", "endswith", "find", "rfind", "index", "rindex", "count"),
    *("lower", "upper", "title", "capitalize", "casefold", "swapcase"),
    *("replace", "join", "removeprefix", "removesuffix", "format", "format_map"),
    *("isdigit", "isalpha", "isalnum", "isnumeric", "isdecimal", "isspace"),
    *("isupper", "islower", "istitle"),
}
_LISTS = (list, tuple, set, frozenset, range, KeysView, ValuesView, ItemsView)
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\*|\d{4,})")
_WIDE_FORMAT = re.compile(r"\d{4,}|\{[^{}]+\{")


class ChatTemplate:
    """A compiled template; threads may share it."""

    def __init__(self, source: str, name: str, error: type[FoveateError]) -> None:
        """Compile a template.

        Args:
            source: Jinja.
            name: where it comes from, for messages.
            error: what to raise when it is not valid.

        Raises:
            FoveateError: of kind ``error``.
        """
        self._environment = _Counted()
        try:
            self._template = self._environment.from_string(source)
        except Exception as problem:  # code from elsewhere: the compiler may fail in any way
            raise error(
                f"{name}: the chat template is not valid Jinja ({_told(problem)}). Correct the "
                "checkpoint's chat_template.jinja and build the bundle again."
            ) from problem

    def render(self, **values: Any) -> str:
        """Return the conversation as text.

        Raises:
            OptionError: the template refuses it, or does more than rendering takes.
        """
        self._environment.meter.reset()
        try:
            return self._template.render(values)
        except Exception as problem:  # code from elsewhere: it may raise anything
            raise OptionError(
                f"The checkpoint's chat template refuses this conversation: {_told(problem)}. Most "
                "want user and assistant turns in alternation, and some no system turn."
            ) from problem


def _told(problem: Exception) -> str:
    said = str(problem) or type(problem).__name__
    return said if len(said) <= 300 else f"{said[:297]}..."


class _Meter(threading.local):
    """What the rendering of this thread may still do."""

    steps = MOST_STEPS
    characters = MOST_CHARACTERS
    items = MOST_ITEMS

    def reset(self) -> None:
        self.steps, self.characters, self.items = MOST_STEPS, MOST_CHARACTERS, MOST_ITEMS

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TemplateError(f"it takes more than {MOST_STEPS:,} steps")

    def charge(self, value: Any) -> None:
        """Count the characters and items of a value, before somebody walks through it."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            self.items -= 1
            if isinstance(one, str):
                self.characters -= len(one)
            elif isinstance(one, Mapping):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, _LISTS):
                self.items -= len(one)
                if self.items >= 0 and not isinstance(one, range):
                    waiting += one
            if self.characters < 0 or self.items < 0:
                self._refuse()

    def charge_product(self, *lengths: int) -> None:
        """Refuse a text that would be as long as this product."""
        if functools.reduce(int.__mul__, lengths) > self.characters:
            self._refuse()

    def _refuse(self) -> None:
        raise TemplateError(
            f"it makes more than {MOST_CHARACTERS:,} characters or {MOST_ITEMS:,} items"
        )


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counted(ImmutableSandboxedEnvironment):
    """The environment that transformers renders chat templates in, with its work counted."""

    intercepted_binops = frozenset(["+", "*", "%", "**", "//", "-"])

    def __init__(self) -> None:
        self.meter = meter = _Meter()

        @pass_context
        def finalize(context: Any, value: Any) -> Any:
            meter.charge(value)
            return value

        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            optimized=False,  # nothing is computed while compiling
            finalize=finalize,
        )
        for name in _LEFT_OUT_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = self._tojson
        self.globals |= {
            "raise_exception": self._raise_exception,
            "strftime_now": self._strftime_now,
            "range": _bounded_range,
        }
        filters: dict[str, Any] = dict(self.filters)
        tests: dict[str, Any] = dict(self.tests)
        self.filters = {name: self._metered(name, one) for name, one in filters.items()}
        self.tests = {name: self._metered(name, one) for name, one in tests.items()}
        self.filters |= {
            "counted turns": self._turns,
            "counted": self._charged,
            "counted text": self._concatenated,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self.weight = 1 + _count(tree) // _NODES_PER_STEP
        counting: nodes.Template = _Counting().visit(tree)
        counting.set_environment(self)
        return counting

    def _metered(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter or test that counts what it is given and what it makes."""

        @functools.wraps(work)
        def metered(*arguments: Any, **named: Any) -> Any:
            self.meter.step()
            given = [self._drained(one) for one in arguments]
            own = given[1:] if hasattr(work, "jinja_pass_arg") else given
            values = [*own, *named.values()]
            self.meter.charge(values)
            most = _MOST_INDENT if name in _MULTIPLYING else _MOST_NUMBER
            if any(isinstance(one, int) and abs(one) > most for one in values[1:]):
                raise TemplateError(f"{name} with a number above {most:,}")
            if name in _MULTIPLYING:
                texts = (len(one) for one in values[1:] if isinstance(one, str))
                whole = len(values[0]) if isinstance(values[0], Sized) else 1
                self.meter.charge_product(whole + 1, max(texts, default=0) + 1)
            made = work(*given, **named)
            if isinstance(made, str | list | tuple | dict):
                self.meter.charge(made)
            return made

        return metered

    def _drained(self, value: Any) -> Any:
        """Return a list in the place of an iterator, whose length nobody knows."""
        if not isinstance(value, Iterator) or isinstance(value, LoopContext):
            return value
        return list(self._turns(value))

    def _turns(self, items: Iterable[Any], cost: int = 1) -> Iterator[Any]:
        for item in items:
            self.meter.step(cost)
            yield item

    def _charged(self, value: Any) -> Any:
        self.meter.charge(value)
        return value

    def _concatenated(self, parts: list[Any]) -> str:
        self.meter.charge(parts)
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.step()
        if operator == "%" and isinstance(left, str):
            self.meter.charge(right)
            if _WIDE_PERCENT.search(left):
                raise TemplateError("a % format of more than 999 columns")
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(times, int):
                    self.meter.charge_product(len(one) + 1, times)
        elif operator == "**" and not (abs(left) <= _MOST_NUMBER and abs(right) <= _MOST_INDENT):
            raise TemplateError("a power of large numbers")
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > _MOST_BITS:
            raise TemplateError(f"a number of more than {_MOST_BITS} bits")
        self.meter.charge(made)
        return made

    def call(self, context: Any, work: Any, *arguments: Any, **named: Any) -> Any:
        self.meter.step(self.weight if isinstance(work, Macro) else 1)
        given = [self._drained(one) for one in arguments]
        owner = getattr(work, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            self.meter.charge([owner, given])
            if getattr(work, "__name__", "") in _MULTIPLYING:
                longest = max((len(one) for one in given if isinstance(one, Sized)), default=0)
                self.meter.charge_product(len(owner) + 1, longest + 1)
        made = super().call(context, work, *given, **named)
        if isinstance(made, str | list | tuple | dict):
            self.meter.charge(made)
        return made

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, bytes | int | float):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
            raise TemplateError("a format of more than 999 columns")
        return wrapped

    def _raise_exception(self, message: str) -> None:
        self.meter.charge(message)
        raise TemplateError(str(message))

    def _strftime_now(self, pattern: str) -> str:
        if len(pattern) > _MOST_INDENT or _WIDE_FORMAT.search(pattern):
            raise TemplateError("a date of more than 999 columns")
        return datetime.now().strftime(pattern)

    @staticmethod
    def _tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})


def _bounded_range(*arguments: int) -> range:
    numbers = range(*arguments)
    if len(numbers) > _MOST_RANGE:
        raise TemplateError(f"a range of more than {_MOST_RANGE:,} numbers")
    return numbers


class _Counting(NodeTransformer):
    """Puts a count into every loop, text and comparison of a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        if node.recursive:
            raise TemplateAssertionError("a loop that calls itself is not bounded", node.lineno)
        cost = nodes.Const(1 + sum(map(_count, node.body)) // _NODES_PER_STEP, lineno=node.lineno)
        self.generic_visit(node)
        node.iter = _through("counted turns", node.iter, cost)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            nodes.Const(one.data, lineno=one.lineno) if isinstance(one, nodes.TemplateData) else one
            for one in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through("counted", node.expr)
        for operand in node.ops:
            operand.expr = _through("counted", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("counted", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _through("counted text", nodes.List(node.nodes, lineno=node.lineno))


def _through(name: str, node: Any, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _count(node: nodes.Node) -> int:
    return 1 + sum(_count(child) for child in node.iter_child_nodes())
