"""Damage for files, by number: the same seed gives the same damage, and a line describes it.

Enters: a file's content. Leaves: `Mutation`s of it, which can be written down as JSON and replayed
(`tests/faults/seeds`). JSON is damaged as a structure, so that most of it still parses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

SEEDS = Path(__file__).parent / "seeds"
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, -0.5, 1e-320, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "../x",
        "/etc/passwd",
        "\ud800",
        "\x00",
        "{{",
        "9" * 5000,
    ),
    *([], {}, [None], [[]], ["x"], [2**40] * 3, {"x": None}, {"": {"": ""}}, [0.1, 0.2, 0.3]),
)
DEEP = "deep"


@dataclass(frozen=True)
class Mutation:
    """One damage.

    Attributes:
        file: which file.
        kind: ``set`` and ``drop`` act on JSON, the others on bytes.
        where: the steps to a value, or the place of a byte.
        value: what comes there.
    """

    file: str
    kind: str
    where: tuple[Any, ...]
    value: Any = None

    def apply(self, content: bytes) -> bytes:
        """Return the damaged content."""
        if self.kind in ("set", "drop"):
            return _json_bytes(self._change(json.loads(content)))
        at = int(self.where[0])
        if self.kind == "flip":
            return content[:at] + bytes([content[at] ^ int(self.value)]) + content[at + 1 :]
        if self.kind == "cut":
            return content[:at]
        return content[:at] + bytes.fromhex(self.value) + content[at:]

    def _change(self, document: Any) -> Any:
        value = json.loads("[" * 900 + "]" * 900) if self.value == DEEP else self.value
        if not self.where:
            return value
        holder = document
        for step in self.where[:-1]:
            holder = holder[step]
        if self.kind == "drop":
            del holder[self.where[-1]]
        else:
            holder[self.where[-1]] = value
        return document


def draw_mutations(files: Mapping[str, bytes], seed: int, count: int) -> list[Mutation]:
    """Return so many mutations, evenly over the files; those with a JSON object as JSON."""
    random = Random(seed)
    places = {
        name: _places(json.loads(content)) for name, content in files.items() if _is_json(content)
    }
    made = []
    for number in range(count):
        name = list(files)[number % len(files)]
        if name in places and random.random() < 0.8:
            made.append(_draw_json(random, name, places[name]))
        else:
            made.append(_draw_bytes(random, name, len(files[name])))
    return made


def load_seeds(suite: str) -> list[Mutation]:
    """Return the mutations that failed once."""
    lines = (SEEDS / f"{suite}.jsonl").read_text("utf-8").splitlines()
    fields = [json.loads(line) for line in lines]
    return [Mutation(one["file"], one["kind"], tuple(one["where"]), one["value"]) for one in fields]


def seed_line(mutation: Mutation) -> str:
    """Return the line of a seed file."""
    return json.dumps(asdict(mutation))


def _draw_json(random: Random, name: str, places: list[tuple[Any, ...]]) -> Mutation:
    # The first steps of a document matter more than the thousandth word of a vocabulary.
    depth = random.randint(0, max(map(len, places)))
    where = random.choice([place for place in places if len(place) <= depth] or places)
    if where and random.random() < 0.15:
        return Mutation(name, "drop", where)
    return Mutation(name, "set", where, random.choice((*HOSTILE, DEEP)))


def _draw_bytes(random: Random, name: str, size: int) -> Mutation:
    # Headers are where formats are decided.
    at = random.randrange(min(size, 400) if random.random() < 0.7 else size)
    kind = random.choice(("flip", "flip", "flip", "cut", "insert"))
    if kind == "flip":
        return Mutation(name, kind, (at,), random.randrange(1, 256))
    if kind == "insert":
        return Mutation(name, kind, (at,), random.randbytes(random.randint(1, 9)).hex())
    return Mutation(name, kind, (at,))


def _places(document: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = [()]
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:20])
    for step, value in items:
        found += [(step, *rest) for rest in _places(value)]
    return found


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _json_bytes(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")
