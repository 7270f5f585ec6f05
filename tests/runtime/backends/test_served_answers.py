"""ask, chat and watch with a language model on a server, which stands on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server_stub import (
    Handler,
    Stub,
    answering,
    breaking_off,
    endless,
    piece,
    refusing,
    serving,
    silent_after,
)
from PIL import Image

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from engines.secret import Secret
from runtime.backends.chat_server import ServerOptions
from runtime.camera.answering import FrameAnswerer
from runtime.camera.loop import CameraOptions
from runtime.commands.chat import Chat
from runtime.commands.watch import WatchOptions, watch
from runtime.conversation import Conversation
from runtime.frames import SourceOptions
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.model import Model, open_model
from runtime.model_options import ModelOptions

ROOT = Path(__file__).parents[3]
QUESTION = "What is it?"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as served:
        yield served


@pytest.fixture
def model(language_bundle: Bundle, stub: Stub) -> Iterator[Model]:
    server = ServerOptions(stub.url, attempts=2, pause_seconds=0.001, silence_seconds=5)
    with open_model(language_bundle, threads=1, server=server) as opened:
        yield opened


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def command(
    module: str, *arguments: object, lines: str = "", key: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        input=lines,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FOVEATE_API_KEY": key},
        check=False,
    )


def words_of(request: dict[str, Any]) -> list[str]:
    """What is said in a request, with the server's own name for what is not text."""
    parts = [part for message in request["messages"] for part in message["content"]]
    return [part.get("text", part["type"]).strip() for part in parts]


def test_ask_writes_what_the_server_says(stub: Stub, language_bundle: Bundle, photo: Path) -> None:
    stub.script = [answering("A red", " cup.")]
    sampling = ("--temperature", 0.5, "--top-k", 4, "--seed", 9, "--stop", ".", "--stop", "!")
    done = command(
        "runtime.ask",
        *(language_bundle.root, photo, QUESTION, "--backend", "vllm", "--llm-url", stub.url),
        *sampling,
        key="from the environment",
    )
    assert (done.returncode, done.stdout) == (0, "A red cup.\n"), done.stderr
    assert "16 visual tokens" in done.stderr
    (request,) = stub.requests
    sent = {name: request[name] for name in ("temperature", "top_k", "seed", "stop")}
    assert sent == {"temperature": 0.5, "top_k": 4, "seed": 9, "stop": [".", "!"]}
    assert stub.keys == ["Bearer from the environment"]


def test_ask_counts_what_the_server_counts(
    stub: Stub, language_bundle: Bundle, photo: Path
) -> None:
    details = {"prompt_tokens": 31, "prompt_tokens_details": {"cached_tokens": 16}}

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        handler.send_event(piece("yes", [11], finish_reason="stop"))
        handler.send_event({"choices": [], "usage": details})
        handler.send_event("[DONE]")

    stub.script = [answering("yes"), behave]
    server = ("--llm-url", stub.url, "--llm-model", "tiny-llama", "--api-key", "k", "--json")
    asked = (language_bundle.root, photo, QUESTION, *server)
    first, second = (json.loads(command("runtime.ask", *asked).stdout) for _ in range(2))
    assert (first["answer"], first["backend"], first["llm_precision"]) == ("yes", "vllm", None)
    assert (first["prompt_tokens"], first["reused_tokens"]) == (31, None)
    assert (second["prompt_tokens"], second["reused_tokens"]) == (31, 16)
    assert first["milliseconds"]["prefill"] > 0
    assert stub.keys == ["Bearer k"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "vllm"), "address is missing. Give it with --llm-url"),
        (("--llm-url", "URL", "--backend", "ort"), 'the backend "ort" runs here'),
        (("--llm-url", "127.0.0.1:8000"), "is not the address of a server"),
        (("--llm-url", "URL", "--context-length", "99"), "has no meaning for a server"),
        (("--llm-model", "x"), "--llm-model needs the server's address"),
        (("--llm-url", "URL", "--llm-model", "x"), "serves tiny-llama, and none is 'x'"),
        (("--llm-url", "URL", "--json-schema", __file__), "the schema is not JSON"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    stub: Stub, language_bundle: Bundle, photo: Path, options: tuple[str, ...], message: str
) -> None:
    given = [stub.url if option == "URL" else option for option in options]
    done = command("runtime.ask", language_bundle.root, photo, QUESTION, *given)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert stub.requests == []


@pytest.mark.parametrize(
    ("behaviour", "options", "message"),
    [
        (refusing(401, "no"), (), "it wants an API key (HTTP 401: no)"),
        (refusing(400, "too long"), (), "refuses the question (HTTP 400: too long)"),
        (breaking_off(piece("A")), (), "broke off in the middle of an answer"),
        (silent_after(seconds=2), ("--llm-timeout", 0.3), "wait longer with --llm-timeout"),
    ],
)
def test_what_a_server_does_wrong_is_told(
    stub: Stub,
    language_bundle: Bundle,
    photo: Path,
    behaviour: Callable[[Handler], None],
    options: tuple[object, ...],
    message: str,
) -> None:
    stub.script = [behaviour]
    asked = (language_bundle.root, photo, QUESTION, "--llm-url", stub.url, *options)
    done = command("runtime.ask", *asked)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("grammar", "sent", "said"),
    [
        (Grammar(("yes", "left of")), {"regex": " ?(yes|left of)"}, "yes"),
        (Grammar(("3.5 (m)", "a|b")), {"regex": r" ?(3\.5 \(m\)|a\|b)"}, "a|b"),
        (Grammar(json_schema='{"type": "object"}'), {"json": {"type": "object"}}, "{}"),
    ],
)
def test_the_form_of_an_answer_is_the_server_s_affair(
    stub: Stub, model: Model, grammar: Grammar, sent: dict[str, Any], said: str
) -> None:
    stub.script = [answering(" ", f" {said}")]
    answer = model.ask(np.zeros((8, 8, 3), np.uint8), QUESTION, GenerationOptions(grammar=grammar))
    assert stub.requests[0]["structured_outputs"] == sent
    assert (answer.text, answer.finish) == (said, "complete")


@pytest.mark.parametrize(
    ("said", "finish", "code"),
    [("banana", "broken_form", 1), ("yes", "complete", 0), ("", "broken_form", 1)],
)
def test_a_server_that_ignores_the_form_is_found_out(
    stub: Stub, language_bundle: Bundle, photo: Path, said: str, finish: str, code: int
) -> None:
    stub.script = [answering(said)]
    asked = (language_bundle.root, photo, QUESTION, "--llm-url", stub.url, "--choices", "yes,no")
    done = command("runtime.ask", *asked, "--json")
    assert done.returncode == code, done.stderr
    told = json.loads(done.stdout)
    assert (told["answer"], told["finish"]) == (said, finish)
    assert ("is none of the choices" in done.stderr) == bool(code)


@pytest.mark.parametrize("key", ["hu\nsh", "hush\u20ac"])
def test_a_key_that_cannot_be_sent_is_not_printed(
    stub: Stub, language_bundle: Bundle, photo: Path, key: str
) -> None:
    asked = (language_bundle.root, photo, QUESTION, "--llm-url", stub.url)
    done = command("runtime.ask", *asked, key=key)
    assert done.returncode == 2
    assert "cannot be sent in a header" in done.stderr
    assert "hu" not in done.stderr and "sh" not in done.stderr.replace("show", "")


def test_a_conversation_is_unchanged_by_an_answer_that_breaks_off(
    stub: Stub, model: Model, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(Conversation(model), GenerationOptions(max_tokens=8), quiet=False)
    stub.script = [answering("A cup."), breaking_off(piece("It is")), answering("Red.")]
    chat.hear(f"/image {photo}")
    chat.hear(QUESTION)
    with pytest.raises(BackendError, match="The conversation is unchanged"):
        chat.hear("Which colour?")
    chat.hear("Which colour?")
    first, broken, again = map(words_of, stub.requests)
    assert broken == again == [*first, "A cup.", "Which colour?"]
    assert first == ["prompt_embeds", QUESTION]
    chat.hear("/tokens")
    told = capsys.readouterr()
    assert told.out == "A cup.\nIt isRed.\n"
    assert "of 512 positions, 16 of them visual tokens" in told.err
    assert "took 31; the server does not say what it reused" in told.err


def test_chat_through_a_pipe(stub: Stub, language_bundle: Bundle, photo: Path) -> None:
    stub.script = [answering("A cup."), answering("Red.")]
    asked = (language_bundle.root, photo, "--llm-url", stub.url, "--json")
    done = command("runtime.chat", *asked, lines="What is it?\nWhich colour?\n")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["turns"]
    assert (first["answer"], second["answer"]) == ("A cup.", "Red.")
    assert (second["reused_tokens"], second["computed_tokens"]) == (None, None)


def test_what_needs_logits_says_so(model: Model) -> None:
    with pytest.raises(BackendError, match='"vllm" runs on a server, which gives text'):
        _ = model.context


def test_watch_goes_on_when_the_server_fails_once(
    stub: Stub, language_bundle: Bundle, tmp_path: Path
) -> None:
    for shade in (20, 120, 220):
        Image.new("RGB", (32, 32), (shade,) * 3).save(tmp_path / f"{shade}.png")
    stub.script = [answering("dark"), breaking_off(piece("gr")), answering("bright")]
    lines: list[dict[str, Any]] = []
    options = WatchOptions(
        CameraOptions(QUESTION, every_frame=True, reuse=False),
        SourceOptions(),
        GenerationOptions(grammar=Grammar(("dark", "bright"))),
        ModelOptions(llm_url=stub.url, threads=1),
    )
    watch(language_bundle.root, str(tmp_path), options, lines.append)
    *answers, summary = lines
    assert [line["answer"] for line in answers] == ["dark", "bright"]
    assert [line["prompt_tokens"] for line in answers] == [31, 31]
    assert summary["errors"] == {"answering failed": 1}
    assert "structured_outputs" in stub.requests[0]


def test_an_interrupted_answer_is_cancelled_on_the_server(stub: Stub, model: Model) -> None:
    stub.script = [endless]
    visual = model.encoder.encode([np.zeros((8, 8, 3), np.uint8)])
    asked_to_stop = iter([False, False, True])
    prefilled: list[bool] = []
    said = FrameAnswerer(model).answer(
        visual, QUESTION, lambda: prefilled.append(True), lambda: next(asked_to_stop)
    )
    assert (said.text, said.finish, prefilled) == ("again again again ", "interrupted", [True])
    assert said.prompt_tokens > 16  # our own count, as the server's comes at the end
    assert stub.cancelled.wait(5)


def test_a_key_is_not_printed() -> None:
    options = ModelOptions(llm_url="http://127.0.0.1", api_key=Secret("hush"))
    assert "hush" not in repr(options)
    assert "hush" not in repr(options.server())


def test_verify_needs_logits(language_bundle: Bundle) -> None:
    from runtime.backends.opening import open_backend

    with pytest.raises(OptionError, match="gives text only, and logits are needed here"):
        open_backend(language_bundle, "vllm")
