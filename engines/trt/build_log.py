"""Read TensorRT's build log: what went wrong, and the layers that are left after fusion.

With a verbose logger and detailed profiling, the builder prints one line for each layer of the
engine. This is the only sight of them where no GPU can open the plan.
"""

from __future__ import annotations

import logging
import re
from typing import Any

_LAYER = re.compile(r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), (?P<rest>.*)", re.DOTALL)
_LISTS = re.compile(
    r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Inputs|Constants|Outputs|TacticName): )"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_TACTIC = re.compile(r"TacticName: (.*?), StreamId: ")
_METADATA = re.compile(r"Metadata: (.*)", re.DOTALL)


def parse_layer(line: str) -> dict[str, Any] | None:
    """Return a line of the log in the form of the engine inspector's JSON, or None.

    Returns:
        ``Name``, ``LayerType``, ``TacticName``, ``Metadata`` and the lists ``Inputs``,
        ``Constants`` and ``Outputs`` of ``{Name, Dimensions, Datatype}``; None where the line does
        not describe a layer.
    """
    found = _LAYER.fullmatch(line.strip())
    if found is None:
        return None
    rest = found["rest"]
    tactic, metadata = _TACTIC.search(rest), _METADATA.search(rest)
    return {
        "Name": found["Name"],
        "LayerType": found["LayerType"],
        **{name: _tensors(text) for name, text in _LISTS.findall(rest)},
        "TacticName": tactic[1] if tactic else "",
        "Metadata": metadata[1] if metadata else "",
    }


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        {"Name": name, "Dimensions": [int(n) for n in sizes.split(",") if n], "Datatype": kind}
        for name, sizes, kind in _TENSOR.findall(text)
    ]


class BuildLog(logging.Handler):
    """Collects Polygraphy's log while its `with` block runs.

    Attributes:
        errors: messages at error level, in order.
        layers: the engine's layers after fusion, in the order they run.
    """

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.errors: list[str] = []
        self.layers: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep an error or the layers that a message describes."""
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            self.errors.append(" ".join(message.split()))
        elif "LayerType: " in message:
            self.layers += filter(None, map(parse_layer, message.splitlines()))

    def __enter__(self) -> BuildLog:
        self._logger = logging.getLogger("Polygraphy")
        self._level = self._logger.level
        self._logger.setLevel(1)  # Polygraphy numbers its own levels; it filters by severity
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
