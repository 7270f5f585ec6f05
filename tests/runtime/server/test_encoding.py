"""Which pictures run as one batch, what one bad picture costs the others, what is remembered."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from engines.errors import EngineError
from runtime.server.encoding import EncodingThread, Remembered
from runtime.server.seen_picture import SeenPicture
from runtime.server.ticket import Ticket
from runtime.vision import VisualTokens
from runtime.vision.visual_tokens import Shown

BAD, BROKEN = 13, 14


def tokens_of(shades: list[int]) -> VisualTokens:
    count = len(shades)
    return VisualTokens(
        tokens=np.array(shades, np.float32).reshape(count, 1, 1),
        valid=np.ones(count, np.int64),
        origin=np.zeros((count, 1), np.int64),
        assignment=np.zeros((count, 4), np.int64),
        milliseconds={"preprocess": 0.0, "encode": 1.0 * count},
    )


class Graphs:
    """A pool of graphs whose tokens are the shade of the picture; it waits for `go`."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.go = threading.Event()
        self.busy = threading.Event()

    def encoder(self, tokens: int) -> Any:
        graphs = self

        class Encoder:
            def encode(self, images: list[np.ndarray], shown: Shown = "alone") -> VisualTokens:
                graphs.busy.set()
                graphs.go.wait(30)
                shades = [int(image[0, 0, 0]) for image in images]
                graphs.batches.append((tokens, shades))
                if BAD in shades:
                    raise EngineError("not finite")
                if BROKEN in shades:
                    raise ZeroDivisionError
                return tokens_of(shades)

        return Encoder()


def shaded(shade: int) -> np.ndarray:
    return np.full((2, 2, 3), shade, np.uint8)


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


def start(graphs: Graphs, batch: int) -> tuple[EncodingThread, Any]:
    """Return the thread while it is busy with a first picture."""
    thread = EncodingThread(graphs, batch)  # type: ignore[arg-type]
    first = thread.encode(shaded(0), 16, Ticket(60))
    graphs.busy.wait(30)
    return thread, first


def test_what_waits_together_runs_together(graphs: Graphs) -> None:
    thread, first = start(graphs, 4)
    waiting = [thread.encode(shaded(n), 64 if n == 3 else 16, Ticket(60)) for n in range(1, 8)]
    graphs.go.set()
    shades = [float(one.result(30).tokens[0, 0, 0]) for one in (first, *waiting)]
    assert shades == [0, 1, 2, 3, 4, 5, 6, 7]
    assert graphs.batches == [(16, [0]), (16, [1, 2, 4, 5]), (64, [3]), (16, [6, 7])]
    thread.close()


def test_a_bad_picture_costs_the_others_nothing(graphs: Graphs) -> None:
    thread, _ = start(graphs, 4)
    waiting = [thread.encode(shaded(n), 16, Ticket(60)) for n in (1, BAD, 2)]
    broken = thread.encode(shaded(BROKEN), 64, Ticket(60))
    graphs.go.set()
    assert waiting[0].result(30).tokens[0, 0, 0] == 1
    assert waiting[2].result(30).tokens[0, 0, 0] == 2
    with pytest.raises(EngineError):
        waiting[1].result(30)
    with pytest.raises(ZeroDivisionError):
        broken.result(30)
    assert thread.alive
    assert thread.encode(shaded(5), 16, Ticket(60)).result(30).tokens[0, 0, 0] == 5
    thread.close()


def test_pictures_nobody_waits_for_are_left_out(graphs: Graphs) -> None:
    thread, _ = start(graphs, 1)
    tickets = [Ticket(60), Ticket(60), Ticket(0)]
    waiting = [thread.encode(shaded(n), 16, ticket) for n, ticket in enumerate(tickets, 1)]
    tickets[0].give_up()
    waiting[1].cancel()
    graphs.go.set()
    last = thread.encode(shaded(9), 16, Ticket(60))
    assert last.result(30).tokens[0, 0, 0] == 9
    for one in waiting:
        with pytest.raises(CancelledError):
            one.result(30)
    assert [shades for _, shades in graphs.batches] == [[0], [9]]
    thread.close()
    assert thread.encode(shaded(1), 16, Ticket(60)).cancelled()


def test_pictures_alone_and_among_others_are_not_one_batch() -> None:
    graphs = Graphs()
    thread = EncodingThread(graphs, batch=4)  # type: ignore[arg-type]
    first = thread.encode(shaded(0), 16, Ticket(60))
    assert graphs.busy.wait(30)
    rest = [thread.encode(shaded(1), 16, Ticket(60), "among_others")]
    rest += [thread.encode(shaded(2), 16, Ticket(60), shown) for shown in ("alone", "among_others")]
    graphs.go.set()
    for one in [first, *rest]:
        one.result(30)
    assert graphs.batches == [(16, [0]), (16, [1, 2]), (16, [2])]
    thread.close()


def test_the_longest_unused_picture_is_forgotten_first() -> None:
    pictures = [SeenPicture(tokens_of([n]), 2, 2, {"encode": 5.0}) for n in range(4)]
    remembered = Remembered(3 * pictures[0].memory_bytes)
    for number, picture in enumerate(pictures[:3]):
        remembered.keep((bytes([number]), 16, "alone"), picture)
    found = remembered.find((b"\0", 16, "alone"))
    assert found is not None
    assert found.milliseconds == {"encode": 0.0}
    remembered.keep((b"\3", 16, "alone"), pictures[3])
    assert remembered.find((b"\1", 16, "alone")) is None
    assert remembered.find((b"\0", 16, "alone")) is not None
    assert remembered.find((b"\0", 64, "alone")) is None
    assert remembered.bytes == 3 * pictures[0].memory_bytes
    nothing = Remembered(0)
    nothing.keep((b"\0", 16, "alone"), pictures[0])
    assert nothing.find((b"\0", 16, "alone")) is None
