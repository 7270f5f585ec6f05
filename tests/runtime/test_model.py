"""Loading a bundle: its parts side by side, and nothing left open when one of them fails."""

from __future__ import annotations

import threading

import pytest

from engines.bundle import Bundle
from engines.errors import BackendError, EngineError
from runtime import model as model_module
from runtime.model import open_model


class Part:
    """Stands in for a graph or a language model; it is loaded when the other one is loading."""

    together = threading.Barrier(2, timeout=20)
    opened: list[Part]

    def __init__(self, error: Exception | None) -> None:
        self.closed = False
        self.together.wait()
        if error is not None:
            raise error
        self.opened.append(self)

    def close(self) -> None:
        self.closed = True


def load(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Bundle,
    graph: Exception | None = None,
    language: Exception | None = None,
) -> None:
    Part.opened = []
    monkeypatch.setattr(model_module, "VisionEncoder", lambda *_, **__: Part(graph))
    monkeypatch.setattr(model_module, "open_text_backend", lambda *_, **__: Part(language))
    open_model(bundle).close()


def test_graph_and_language_model_are_loaded_side_by_side(
    monkeypatch: pytest.MonkeyPatch, language_bundle: Bundle
) -> None:
    load(monkeypatch, language_bundle)
    assert [part.closed for part in Part.opened] == [True, True]


@pytest.mark.parametrize(
    ("graph", "language", "told"),
    [
        (EngineError("no graph"), None, "no graph"),
        (None, BackendError("no decoder"), "no decoder"),
        (EngineError("no graph"), BackendError("no decoder"), "no graph"),
    ],
)
def test_when_one_fails_the_other_is_closed(
    monkeypatch: pytest.MonkeyPatch,
    language_bundle: Bundle,
    graph: Exception | None,
    language: Exception | None,
    told: str,
) -> None:
    with pytest.raises((EngineError, BackendError), match=told):
        load(monkeypatch, language_bundle, graph, language)
    assert all(part.closed for part in Part.opened)
