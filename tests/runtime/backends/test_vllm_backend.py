"""The vLLM client against a loopback server that behaves well, badly, and not at all."""

from __future__ import annotations

import base64
import io
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_server_stub import (
    Behaviour,
    Stub,
    answering,
    breaking_off,
    endless,
    hanging_up,
    piece,
    refusing,
    serving,
    silent_after,
)

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from engines.secret import Secret
from runtime.backends.chat_server import ChatServer, ServerOptions
from runtime.backends.tensor_payload import payload_from_rows
from runtime.backends.vllm import VllmBackend, open_vllm_backend
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.language.sampling import Sampling

PICTURE = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
QUESTION = [Turn("user", "What is this?", images=1)]


def quick(stub: Stub, **changes: object) -> ServerOptions:
    fields = {"silence_seconds": 10, "pause_seconds": 0.001} | changes
    return ServerOptions(stub.url, **fields)  # type: ignore[arg-type]


def ask(bundle: Bundle, stub: Stub, **changes: object) -> str:
    backend = open_vllm_backend(bundle, quick(stub, **changes))
    return "".join(backend.generate(QUESTION, [PICTURE], GenerationOptions(max_tokens=8)))


def test_an_answer_comes_in_pieces(language_bundle: Bundle) -> None:
    with serving(answering("A red", " cup", ".")) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        generation = backend.generate(QUESTION, [PICTURE], GenerationOptions(max_tokens=8))
        assert stub.requests == []
        assert list(generation) == ["A red", " cup", "."]
    assert (generation.text, generation.finish) == ("A red cup.", "stop_token")
    assert generation.token_ids == [10, 11, 12]
    assert generation.prompt_tokens == 31
    assert (backend.model, backend.context_length, backend.hidden_size) == ("tiny-llama", 512, 64)
    assert not backend.capabilities.logits and not backend.capabilities.rewind


def test_the_space_after_the_prompt_is_not_part_of_the_answer(language_bundle: Bundle) -> None:
    """vLLM decodes an answer as the prompt's continuation, so it may begin with a space."""
    with serving(answering(" red", " cup")) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        generation = backend.generate(QUESTION, [PICTURE], GenerationOptions())
        assert "".join(generation) == generation.text == "red cup"


def test_only_the_picture_and_the_words_are_sent(language_bundle: Bundle) -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.1, seed=3)
    options = GenerationOptions(max_tokens=9, stop=("\n",), sampling=sampling)
    with serving() as stub:
        backend = open_vllm_backend(language_bundle, quick(stub, api_key=Secret("secret")))
        list(backend.generate(QUESTION, [PICTURE], options))
    (request,) = stub.requests
    (message,) = request.pop("messages")
    picture, words = message["content"]
    assert message["role"] == "user"
    assert picture["type"] == "prompt_embeds"
    assert words == {"type": "text", "text": "\nWhat is this?"}  # the template's own line break
    assert request == {
        "model": "tiny-llama",
        "add_special_tokens": False,  # the template begins with <s>
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ["\n"],
        "stop_token_ids": [2],
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert stub.keys == ["Bearer secret"]
    assert len(picture["data"]) < 16 * 64 * 2 * 4 / 3 + 1100


def test_a_conversation_is_sent_whole(language_bundle: Bundle) -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "And these?", images=2),
        Turn("assistant", "Two cups."),
        Turn("user", "Which is red?"),
    ]
    with serving() as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        list(backend.generate(turns, [PICTURE, PICTURE], GenerationOptions()))
    kinds = [
        (message["role"], [part.get("text", part["type"]) for part in message["content"]])
        for message in stub.requests[0]["messages"]
    ]
    assert kinds == [
        ("system", ["Be brief."]),
        ("user", ["prompt_embeds", "\n", "prompt_embeds", "\nAnd these?"]),
        ("assistant", ["Two cups."]),
        ("user", ["Which is red?"]),
    ]


@pytest.mark.parametrize("text", ["bye </s>", "<image>", "what is <prompt_embeds>?"])
def test_control_tokens_in_words_are_not_sent(language_bundle: Bundle, text: str) -> None:
    with serving() as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        with pytest.raises(OptionError, match="would obey as a control token"):
            backend.generate([Turn("user", text, images=1)], [PICTURE], GenerationOptions())


def test_a_template_that_a_server_would_render_differently_is_refused(
    language_bundle: Bundle,
) -> None:
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
        "{% elif loop.first %}{{ c['text'] }}{% else %}, {{ c['text'] }}{% endif %}{% endfor %}"
        "{% endfor %}"
    )
    prompt = language_bundle.manifest.prompt.model_copy(update={"chat_template": template})
    manifest = language_bundle.manifest.model_copy(update={"prompt": prompt})
    with serving() as stub:
        backend = open_vllm_backend(replace(language_bundle, manifest=manifest), quick(stub))
        with pytest.raises(OptionError, match="chat template cannot be used on a server"):
            backend.generate(QUESTION, [PICTURE], GenerationOptions())


@pytest.mark.parametrize(
    ("behaviour", "finish"),
    [
        (answering("a", finish="stop", stop_reason="\n"), "stop_string"),
        (answering("a", finish="stop", stop_reason=2), "stop_token"),
        (answering("a", finish="length"), "context_full"),
        (answering(*"abcdefgh", finish="length"), "max_tokens"),
    ],
)
def test_why_an_answer_ended(language_bundle: Bundle, behaviour: Behaviour, finish: str) -> None:
    with serving(behaviour) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        generation = backend.generate(QUESTION, [PICTURE], GenerationOptions(max_tokens=8))
        "".join(generation)
    assert generation.finish == finish


@pytest.mark.parametrize(
    "trouble", [refusing(503), refusing(429), refusing(502), refusing(500), hanging_up]
)
def test_passing_trouble_is_tried_again(language_bundle: Bundle, trouble: Behaviour) -> None:
    with serving(trouble, trouble, answering("at last")) as stub:
        assert ask(language_bundle, stub) == "at last"
    assert len(stub.requests) == 3


def test_pauses_double_and_a_busy_server_may_ask_for_longer(language_bundle: Bundle) -> None:
    pauses: list[float] = []
    busy = refusing(429, Retry_After="7")
    with serving(refusing(503), refusing(503), busy, answering("ok")) as stub:
        server = ChatServer(quick(stub, pause_seconds=0.5), sleep=pauses.append)
        backend = VllmBackend(server, language_bundle, "tiny-llama", 512)
        list(backend.generate(QUESTION, [PICTURE], GenerationOptions()))
    assert [round(pause / 0.5) for pause in pauses[:2]] == [1, 2]
    assert pauses[2] == 7


@pytest.mark.parametrize(
    ("behaviour", "attempts", "message"),
    [
        (refusing(401, "bad key"), 1, r"wants an API key \(HTTP 401: bad key\).*--api-key"),
        (refusing(404, "no model"), 1, "no such model or page"),
        (refusing(400, "too long"), 1, r"refuses the question \(HTTP 400: too long\)"),
        (
            refusing(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`"),
            1,
            "Start it with --enable-prompt-embeds",
        ),
        (refusing(503, "loading"), 3, r"cannot answer now \(HTTP 503: loading\), asked up to 3"),
        (hanging_up, 3, r"No answer from .*, asked 3 times"),
        (breaking_off(piece("A"), piece(" red")), 1, "broke off .* after 2 pieces .*ask again"),
        (breaking_off("{"), 1, "which is not JSON"),
        (breaking_off("[]"), 1, "expected a JSON object"),
        (breaking_off({"error": {"message": "CUDA"}}), 1, r"failed in the middle .*\(CUDA\)"),
        (breaking_off(piece("A"), "[DONE]"), 1, "without saying why it stopped"),
    ],
)
def test_what_cannot_be_mended_is_told(
    language_bundle: Bundle, behaviour: Behaviour, attempts: int, message: str
) -> None:
    with serving(behaviour) as stub:
        with pytest.raises(BackendError, match=message):
            ask(language_bundle, stub, attempts=3)
        assert len(stub.requests) == attempts
        stub.script = [answering("still here")]  # the conversation survives
        assert ask(language_bundle, stub) == "still here"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (silent_after(seconds=4), "did not answer in time, asked once"),
        (silent_after("A red", seconds=4), r"fell silent for 1 s .*after 1 pieces"),
    ],
)
def test_a_slow_server_is_waited_for_once(
    language_bundle: Bundle, behaviour: Behaviour, message: str
) -> None:
    with serving(behaviour) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        server = ChatServer(quick(stub, silence_seconds=1.0))
        hasty = VllmBackend(server, language_bundle, backend.model, backend.context_length)
        with pytest.raises(BackendError, match=message):
            list(hasty.generate(QUESTION, [PICTURE], GenerationOptions()))
        assert len(stub.requests) <= 1


def test_a_refused_key_is_called_refused(language_bundle: Bundle) -> None:
    with (
        serving(refusing(401)) as stub,
        pytest.raises(BackendError, match="API key is refused") as told,
    ):
        ask(language_bundle, stub, api_key=Secret("hush"))
    assert "hush" not in str(told.value)


def test_no_server_is_told(language_bundle: Bundle) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(BackendError, match=r"asked 2 times .*Refused.*--backend ort"):
        open_vllm_backend(language_bundle, ServerOptions(url, attempts=2, pause_seconds=0))


def test_leaving_early_cancels_the_answer(language_bundle: Bundle) -> None:
    with serving(endless) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        for count, _ in enumerate(backend.generate(QUESTION, [PICTURE], GenerationOptions())):
            if count == 3:
                break
        assert stub.cancelled.wait(5)


@pytest.mark.parametrize(
    ("models", "named", "message"),
    [
        ({"data": []}, None, "serves no model"),
        ({"data": [{"id": "a"}, {"id": "b"}]}, None, "serves a, b, which one was not said"),
        ({"data": [{"id": "a"}]}, "c", "serves a, and none is 'c'.*--llm-model"),
        ({"hello": 1}, None, "not with a list of models"),
        ([], None, "not with a list of models"),
    ],
)
def test_the_model_must_be_one(language_bundle: Bundle, models, named, message: str) -> None:
    with serving() as stub:
        stub.models = models
        with pytest.raises(BackendError, match=message):
            open_vllm_backend(language_bundle, quick(stub, model=named))


def test_a_prompt_longer_than_the_server_takes_is_not_sent(language_bundle: Bundle) -> None:
    with serving() as stub:
        stub.models = {"data": [{"id": "tiny", "max_model_len": 20}]}
        with pytest.raises(BackendError, match="the context holds 20"):
            ask(language_bundle, stub)
        assert stub.requests == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", ""])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(OptionError, match="not the address of a server"):
        ServerOptions(url)


@pytest.mark.parametrize("change", [{"attempts": 0}, {"silence_seconds": 0}, {"pause_seconds": -1}])
def test_limits_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="must be more than 0"):
        ServerOptions("http://127.0.0.1", **change)


@pytest.mark.parametrize("shape", [(1, 1), (64, 4096), (3, 70000)])
def test_pytorch_reads_the_payload(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sent = io.BytesIO(base64.b64decode(payload_from_rows(rows, shape[1]), validate=True))
    tensor = torch.load(sent, weights_only=True, map_location="cpu")
    assert tensor.dtype == torch.float16 and tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), rows.astype(np.float16))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((2, 64), np.nan, np.float32), "NaN, infinity or numbers beyond 65504"),
        (np.full((2, 64), np.inf, np.float32), "were not sent"),
        (np.full((2, 64), 7e4, np.float32), "beyond 65504"),
        (np.zeros((2, 32), np.float32), "are 32 wide, and the language model takes 64"),
        (np.zeros((2, 64), np.float64), r"are float64\[2, 64\]: expected float32\[N, 64\]"),
        (np.zeros((1, 2, 64), np.float32), r"are float32\[1, 2, 64\]"),
        (np.zeros((0, 64), np.float32), "with N at least 1"),
    ],
)
def test_what_would_harm_a_server_never_leaves(
    language_bundle: Bundle, rows: np.ndarray, message: str
) -> None:
    with serving() as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        with pytest.raises(BackendError, match=message):
            backend.generate(QUESTION, [rows], GenerationOptions())
        assert stub.requests == []


def test_a_server_that_ignores_max_tokens_is_left(language_bundle: Bundle) -> None:
    with serving(answering(*["again "] * 500)) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub))
        generation = backend.generate(QUESTION, [PICTURE], GenerationOptions(max_tokens=3))
        with pytest.raises(BackendError, match="asked for 3 tokens at most and sent 5 in 5 events"):
            list(generation)
    assert generation.finish is None


def test_an_answer_has_a_last_moment(language_bundle: Bundle) -> None:
    with serving(endless) as stub:
        backend = open_vllm_backend(language_bundle, quick(stub, answer_seconds=0.3))
        with pytest.raises(BackendError, match=r"took longer than 0\.3 s .*--llm-deadline"):
            list(backend.generate(QUESTION, [PICTURE], GenerationOptions(max_tokens=10**6)))


def test_the_key_is_taken_out_of_what_the_server_says(language_bundle: Bundle) -> None:
    told = refusing(401, "Incorrect API key provided: hush")
    with serving(told) as stub, pytest.raises(BackendError, match=r"provided: \*+\)"):
        ask(language_bundle, stub, api_key=Secret("hush"))
