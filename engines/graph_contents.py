"""What an ONNX file of a bundle may hold, checked before an engine sees it.

Enters: a graph's file, which may come from a stranger. Leaves: nothing, or a `BundleError` that
names what our exporters never write: loops and branches (their length is data, so nothing bounds
them), operators from outside ONNX, and weights outside the bundle. The file is mapped and its
weights are stepped over, so a graph of gigabytes takes as long as one of megabytes.
"""

from __future__ import annotations

import mmap
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from engines.bundle import Bundle
from engines.errors import BundleError, EngineError

ONNX_DOMAINS = ("", "ai.onnx")
MICROSOFT_DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators, which language models are made of."""

_CONTROL_FLOW = {"Loop", "If", "Scan", "SequenceMap"}
_PRECOMPILED = {"EPContext"}
_MOST_FIELDS = 5_000_000
"""A graph of 10,000 operators has about a tenth of it."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LAST_VARINT_SHIFT = 63

# Message -> number of a field in it -> what that field holds (onnx.proto).
_WALKED = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {4: "op_type", 5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
_TEXTS = {"op_type", "domain", "key", "value"}


@dataclass
class _Found:
    """What a graph holds, as far as it is judged."""

    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: int = 0
    external: set[tuple[str, int, int]] = field(default_factory=set)


def check_graph_contents(
    bundle: Bundle, file: str, domains: tuple[str, ...] = ONNX_DOMAINS
) -> None:
    """Refuse a graph of a bundle that holds what our exporters never write.

    Args:
        bundle: an opened bundle.
        file: the graph, one of the bundle's files.
        domains: where its operators may come from.

    Raises:
        BundleError: the graph holds something else.
        EngineError: the file is no ONNX graph.
    """
    path = bundle.path(file)
    try:
        with path.open("rb") as stream:
            found = _read(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise EngineError(
            f"{path} is not a graph that ONNX Runtime or another engine can load: {error}. The "
            "file is damaged. Copy it again, or build the bundle again."
        ) from error
    problems = [
        f"the operator {f'{domain}.' if domain else ''}{name}"
        for domain, name in sorted(found.operators)
        if name in _CONTROL_FLOW | _PRECOMPILED or domain not in domains
    ]
    problems += ["functions of its own"] if found.functions else []
    problems += sorted(
        f"weights in {location!r}, which is not in the bundle or ends before {offset + length:,}"
        for location, offset, length in found.external
        if not _is_held(bundle, file, location, offset, length)
    )
    if problems:
        raise BundleError(
            f"{path} holds what export.build never writes: {'; '.join(problems[:10])}. It is "
            "refused, because nothing bounds what it does. Build the bundle from its checkpoint."
        )


def _is_held(bundle: Bundle, file: str, location: str, offset: int, length: int) -> bool:
    name = posixpath.join(posixpath.dirname(file), location)
    record = bundle.manifest.files.get(name)
    return record is not None and offset >= 0 and length >= 0 and offset + length <= record.bytes


def _read(view: memoryview) -> _Found:
    found = _Found()
    count = 0
    waiting: list[tuple[str, memoryview]] = [("model", view)]
    while waiting:
        kind, message = waiting.pop()
        texts: dict[str, str] = {}
        entries: dict[str, str] = {}
        for number, value in _fields(message):
            count += 1
            if count > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS:,} fields")
            holds = _WALKED[kind].get(number)
            if holds is None or value is None:
                continue
            if holds in _TEXTS:
                texts[holds] = str(value, "utf-8")
            elif holds == "entry":
                pair = {_WALKED["entry"].get(n): v for n, v in _fields(value) if v is not None}
                key, text = (str(pair.get(name) or b"", "utf-8") for name in ("key", "value"))
                entries[key] = text
            else:
                waiting.append((holds, value))
        _note(found, kind, texts, entries)
    return found


def _note(found: _Found, kind: str, texts: dict[str, str], entries: dict[str, str]) -> None:
    if kind == "function":
        found.functions += 1
    elif kind == "node":
        found.operators.add((texts.get("domain", ""), texts.get("op_type", "")))
    elif kind == "tensor" and entries:
        offset, length = (int(entries.get(name, "0")) for name in ("offset", "length"))
        found.external.add((entries.get("location", ""), offset, length))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Yield the number of each field of a protobuf message, with its bytes where it has some."""
    at, end = 0, len(message)
    read = partial(_varint, message)
    while at < end:
        key, at = read(at)
        kind = key & 7
        value = None
        if kind == _VARINT:
            _, at = read(at)
        elif kind == _BYTES:
            length, at = read(at)
            value = message[at : at + length]
            at += length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > end:
            raise ValueError("a field that is longer than the file")
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > _LAST_VARINT_SHIFT:
            raise ValueError("a number that never ends")
