"""Several servers of one language model: which is asked, and what happens when one dies."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from runtime.backends import server_pool
from runtime.backends.chat_server import ServerOptions
from runtime.backends.server_pool import ServerPool
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import PromptWriter, Turn
from tests.runtime.backends.chat_server_stub import (
    Stub,
    answering,
    breaking_off,
    hanging_up,
    piece,
    refusing,
    serving,
    silent_after,
)

QUESTION = [Turn("user", "What is this?", images=1)]
PICTURE = np.ones((16, 64), np.float32)
NOWHERE = "http://127.0.0.1:1/v1"
PATIENCE_S = 30


@pytest.fixture(autouse=True)
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "CHECK_S", 3600.0)


def pool_of(bundle: Bundle, *stubs: Stub | str) -> ServerPool:
    urls = [stub if isinstance(stub, str) else stub.url for stub in stubs]
    servers = [
        ServerOptions(url, connect_seconds=1, silence_seconds=0.3, attempts=1) for url in urls
    ]
    return ServerPool(bundle, servers, PromptWriter(bundle))


def ask(pool: ServerPool, most: int = 20) -> str:
    generation = pool.generate(QUESTION, [PICTURE], GenerationOptions(max_tokens=most))
    text = "".join(generation)
    assert text == generation.text
    assert sum(rank.asked for rank in pool.ranks) == 0
    return text


def test_questions_go_to_the_server_with_the_fewest(language_bundle: Bundle) -> None:
    with serving(answering("a")) as first, serving(answering("b")) as second:
        pool = pool_of(language_bundle, first, second)
        generations = [pool.generate(QUESTION, [PICTURE], GenerationOptions()) for _ in range(4)]
        assert sorted("".join(generation) for generation in generations) == ["a", "a", "b", "b"]
        assert [rank.asked for rank in pool.ranks] == [0, 0]


@pytest.mark.parametrize(
    "trouble",
    [hanging_up, refusing(503), refusing(429), breaking_off(), silent_after(seconds=0.6)],
)
def test_another_server_answers_when_one_is_lost(
    language_bundle: Bundle, trouble: Callable[..., None]
) -> None:
    with serving(trouble) as bad, serving(answering("all", " good")) as good:
        pool = pool_of(language_bundle, bad, good)
        assert ask(pool) == "all good"
        assert [rank.up for rank in pool.ranks] == [False, True]
        assert ask(pool) == "all good"
        assert len(bad.requests) == 1  # it is not asked again while it is down


def test_an_answer_goes_on_where_a_server_was_lost(language_bundle: Bundle) -> None:
    broken = breaking_off(piece("all", [10]), piece(" go", [11]))
    with serving(broken) as bad, serving(answering("a", "ll good")) as good:
        assert ask(pool_of(language_bundle, bad, good)) == "all good"


@pytest.mark.parametrize("other", [answering("all bad"), answering("al")])
def test_other_words_are_not_put_behind_those_already_said(
    language_bundle: Bundle, other: Callable[..., None]
) -> None:
    broken = breaking_off(piece("all", [10]), piece(" go", [11]))
    with (
        serving(broken) as bad,
        serving(other) as good,
        pytest.raises(BackendError, match="answers in other words"),
    ):
        ask(pool_of(language_bundle, bad, good))


def test_without_any_server_it_says_so(language_bundle: Bundle) -> None:
    with serving(hanging_up) as first, serving(refusing(500)) as second:
        pool = pool_of(language_bundle, first, second)
        with pytest.raises(BackendError, match=r"cannot answer now|No answer from"):
            ask(pool)
        assert pool.up == 0
    with pytest.raises(BackendError, match="No answer from"):
        pool_of(language_bundle, NOWHERE)


def test_a_refusal_is_not_carried_to_the_next_server(language_bundle: Bundle) -> None:
    with serving(refusing(400, "no such thing")) as first, serving() as second:
        with pytest.raises(BackendError, match="no such thing"):
            ask(pool_of(language_bundle, first, second))
        assert not second.requests


def test_what_must_not_be_sent_is_not_sent(language_bundle: Bundle) -> None:
    with serving() as stub:
        pool = pool_of(language_bundle, stub)
        for bad in (np.nan, np.inf, 1e6):  # the last is none only in float16
            picture = PICTURE.copy()
            picture[3, 4] = bad
            with pytest.raises(BackendError, match="were not sent"):
                pool.generate(QUESTION, [picture], GenerationOptions())
        with pytest.raises(OptionError):
            pool.generate([Turn("user", "</s>", images=1)], [PICTURE], GenerationOptions())
        assert not stub.requests
        assert pool.ranks[0].asked == 0


def test_servers_come_and_go(language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "CHECK_S", 0.05)
    with serving(answering("late")) as late, serving(answering("here")) as here:
        models, late.models = late.models, {"data": "not yet"}
        pool = pool_of_late(language_bundle, late, here)
        assert [rank.up for rank in pool.ranks] == [False, True]
        late.models = models
        wait_until(lambda: pool.ranks[0].up)
        here.models = "gone"
        wait_until(lambda: not pool.ranks[1].up)
        assert ask(pool) == "late"
        pool.close()


def pool_of_late(bundle: Bundle, late: Stub, here: Stub) -> ServerPool:
    """A pool whose first server was not there when it was made."""
    pool = pool_of(bundle, NOWHERE, here)
    pool.ranks[0].options = ServerOptions(late.url, attempts=1)
    return pool


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)
