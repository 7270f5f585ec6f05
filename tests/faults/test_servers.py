"""A language server that is broken or means harm ends an answer with an error, in time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import FoveateError, OptionError
from engines.secret import Secret
from runtime.backends import TextBackend
from runtime.backends.chat_server import ChatServer, ServerOptions
from runtime.backends.trtllm import TrtLlmBackend
from runtime.backends.vllm import VllmBackend, open_vllm_backend
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.prompt import PromptWriter, Turn
from tests.faults.hostile_responses import KEY, models, response
from tests.faults.hostile_server import HostileServer, Response, hostile_server
from tests.faults.scale import cases
from tests.faults.time_limit import time_limit

SEEDS = sorted((Path(__file__).parent / "seeds" / "servers").iterdir())
LIMIT_S = 20.0
"""Far more than the patience below, so that a busy machine is no failure."""
PICTURE = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
QUESTION = [Turn("user", "What is this?", images=1)]
MAX_TOKENS = 3
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
FORMS = (None, Grammar(("yes", "no")), Grammar(json_schema=SCHEMA))


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with hostile_server() as opened:
        yield opened


@pytest.fixture(scope="module")
def writer(language_bundle: Bundle) -> PromptWriter:
    return PromptWriter(language_bundle)


def options(server: HostileServer) -> ServerOptions:
    return ServerOptions(
        server.url, Secret(KEY), silence_seconds=0.3, answer_seconds=0.6, attempts=1
    )


def require_told_well(error: FoveateError) -> None:
    message = str(error)
    assert KEY not in message
    assert message.replace("\n", "").isprintable() and "\n" not in message
    assert len(message) < 1500


def ask(
    server: HostileServer,
    bundle: Bundle,
    writer: PromptWriter,
    form: Grammar | None,
    kind: str = "vllm",
) -> str | None:
    """Ask once; return how the answer ended, or None where it ended with an error."""
    chat = ChatServer(options(server))
    backend: TextBackend = VllmBackend(chat, bundle, "tiny-llama", 512, writer)
    if kind == "trtllm":
        backend = TrtLlmBackend(
            chat, bundle, "tiny-llama", bundle.manifest.text.context_length, writer
        )
    generation = backend.generate(QUESTION, [PICTURE], GenerationOptions(MAX_TOKENS, grammar=form))
    try:
        with time_limit(LIMIT_S):
            pieces = list(generation)
    except FoveateError as error:
        require_told_well(error)
        return None
    assert "".join(pieces) == generation.text
    assert len(generation.token_ids) <= MAX_TOKENS + 1 and len(pieces) <= MAX_TOKENS + 1
    if form is not None and generation.finish == "complete":
        assert has_form(generation.text, form), generation.text
    return generation.finish


def has_form(text: str, form: Grammar) -> bool:
    """What the form says, in other words than the code under test."""
    if form.choices:
        return text in ("yes", "no")
    document = json.loads(text)
    return isinstance(document, dict) and type(document.get("n")) is int


def test_hostile_answers(
    server: HostileServer, language_bundle: Bundle, writer: PromptWriter
) -> None:
    ends: list[str | None] = []
    for number in range(cases(2700)):
        server.response = response(number)
        ends.append(ask(server, language_bundle, writer, FORMS[number // 3 % 3]))
    # The responses reach every end; else they would try nothing.
    assert {None, "complete", "broken_form", "stop_token"} <= set(ends)


def test_hostile_answers_of_tensorrt_llm(
    server: HostileServer, language_bundle: Bundle, writer: PromptWriter
) -> None:
    ends: list[str | None] = []
    for number in range(cases(900)):
        server.response = response(number)
        ends.append(ask(server, language_bundle, writer, FORMS[number // 3 % 3], "trtllm"))
    assert None in ends


def test_hostile_lists_of_models(
    server: HostileServer, language_bundle: Bundle, writer: PromptWriter
) -> None:
    opened = 0
    for number in range(cases(300)):
        server.response = models(number)
        try:
            with time_limit(LIMIT_S):
                backend = open_vllm_backend(language_bundle, options(server), writer)
        except FoveateError as error:
            require_told_well(error)
        else:
            opened += 1
            assert 0 < backend.context_length <= language_bundle.manifest.text.context_length
    assert opened < cases(300)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
@pytest.mark.parametrize("form", FORMS, ids=("free", "choices", "schema"))
def test_what_was_once_a_fault(
    seed: Path,
    form: Grammar | None,
    server: HostileServer,
    language_bundle: Bundle,
    writer: PromptWriter,
) -> None:
    """Each file is what a server sent; its name says what it does wrong."""
    sent = seed.read_bytes()

    def replay() -> Iterator[bytes]:
        yield sent

    stubborn: Response = replay
    server.response = stubborn
    end = ask(server, language_bundle, writer, form)
    assert end == ("broken_form" if seed.stem == "banana" and form is not None else end)
    assert (end is None) == (seed.stem != "banana")


ADDRESSES = (
    "http://h:99999", "http://h:abc", "http://[::1", "http://a b/", "http://a..b/", "http://h:0",
    "http://" + "a" * 70, "http://h/\n", "http://é/", "http://", "", "h:8000", "ftp://h",
    "http://h:-1", "http://h/\x00", "http://[zz]:1]", "http://h:1/?key=hush", "//h", "http:h",
    "http://user:hush@h/", "http://us er:hush@h/",
)  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(OptionError) as told:
        ServerOptions(address)
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    "key", ["hush\n", "hush\r\nX: y", "hush\x00", "hush€", " hush", "hush\udcff"]
)
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(OptionError, match="cannot be sent in a header") as told:
        ServerOptions("http://127.0.0.1", Secret(key))
    assert "hush" not in str(told.value)
