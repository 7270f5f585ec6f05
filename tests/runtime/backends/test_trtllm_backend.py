"""The TensorRT-LLM client against a stand-in of `trtllm-serve`, which runs the served directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_server_stub import MODELS, Stub, answering, breaking_off, refusing, serving
from trtllm_stand_in import MODELS as TRTLLM_MODELS
from trtllm_stand_in import StandIn

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from export.checkpoint.llava import open_checkpoint
from export.language.served_model import write_served_model
from runtime.backends import TextBackend
from runtime.backends.chat_server import ServerOptions
from runtime.backends.local_text import LocalText
from runtime.backends.opening import open_text_backend
from runtime.backends.ort import open_ort_backend
from runtime.backends.served_text import ServedText
from runtime.backends.server_pool import ServerPool
from runtime.backends.trtllm import TrtLlmBackend, open_trtllm_backend
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.parts import Embeddings
from runtime.language.prompt import PromptWriter, Turn
from runtime.language.sampling import Sampling

QUESTION = [Turn("user", "What is this?", images=1)]
TWO_PICTURES = [
    Turn("system", "Be brief."),
    Turn("user", "And these?", images=2),
    Turn("assistant", "Two cups."),
    Turn("user", "Which is red?"),
]


def picture(seed: int, rows: int = 16) -> Embeddings:
    """Visual tokens in numbers that float16 holds exactly."""
    tokens = np.random.default_rng(seed).normal(size=(rows, 64))
    return tokens.astype(np.float16).astype(np.float32)


def options_for(stub: Stub) -> ServerOptions:
    return ServerOptions(stub.url, silence_seconds=30, pause_seconds=0.001, attempts=2)


@pytest.fixture(scope="module")
def served(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "llm"
    write_served_model(open_checkpoint(language_checkpoint), out, "trtllm")
    return out


@pytest.fixture(params=[True, False], ids=["parts in order", "text before pictures"])
def stand_in(served: Path, request: pytest.FixtureRequest) -> StandIn:
    return StandIn(served, keeps_order=request.param)


@pytest.fixture
def stub(stand_in: StandIn) -> Iterator[Stub]:
    with serving(stand_in) as server:
        server.models = TRTLLM_MODELS
        yield server


@pytest.fixture(scope="module")
def local(language_bundle: Bundle) -> Iterator[TextBackend]:
    backend = open_ort_backend(language_bundle, threads=1)
    yield LocalText(backend, PromptWriter(language_bundle))
    backend.close()


def say(
    backend: TextBackend, turns: Sequence[Turn], pictures: Sequence[Embeddings], tokens: int = 12
) -> tuple[str, str | None, int]:
    generation = backend.generate(turns, pictures, GenerationOptions(max_tokens=tokens))
    text = "".join(generation)
    assert text == generation.text
    return text, generation.finish, generation.prompt_tokens


@pytest.mark.parametrize(
    ("turns", "pictures"),
    [
        ([Turn("user", "Who are you?")], []),
        (QUESTION, [picture(1)]),
        (QUESTION, [picture(2, rows=3)]),
        (TWO_PICTURES, [picture(1), picture(2, rows=5)]),
        ([*TWO_PICTURES, Turn("assistant", "The left."), Turn("user", "ä € 字 \n\n sure?", 1)],
         [picture(1), picture(2), picture(3)]),
    ],
)  # fmt: skip
def test_the_server_answers_as_the_bundle_does(
    language_bundle: Bundle, stub: Stub, local: TextBackend, turns, pictures
) -> None:
    backend = open_trtllm_backend(language_bundle, options_for(stub))
    assert say(backend, turns, pictures) == say(local, turns, pictures)


def test_another_picture_is_not_answered_from_the_cache(
    language_bundle: Bundle, stub: Stub, stand_in: StandIn, local: TextBackend
) -> None:
    """Every picture has the same ids, so the server's cache of prefixes cannot tell them apart."""
    backend = open_trtllm_backend(language_bundle, options_for(stub))
    for seed in (1, 2, 1):
        assert say(backend, QUESTION, [picture(seed)]) == say(local, QUESTION, [picture(seed)])
    assert stand_in.reused == 0
    assert len({request["cache_salt"] for request in stub.requests}) == 3
    without = [{**request, "cache_salt": None} for request in stub.requests[:2]]
    for request in without:
        list(backend._server.stream(request))
    assert stand_in.reused == 1  # so it would have been


def test_it_may_be_opened_by_name(language_bundle: Bundle, stub: Stub) -> None:
    writer = PromptWriter(language_bundle)
    backend = open_text_backend(writer, language_bundle, "trtllm", server=options_for(stub))
    assert isinstance(backend, TrtLlmBackend)
    assert (backend.name, backend.model, backend.context_length) == ("trtllm", "llm", 1024)
    assert backend.capabilities.apart and not backend.capabilities.rewind
    assert not backend.capabilities.logits and not backend.capabilities.fork
    with pytest.raises(OptionError, match=r'"trtllm" is a server, and its address is missing'):
        open_text_backend(writer, language_bundle, "trtllm")


def test_several_servers_are_asked(language_bundle: Bundle, stub: Stub, local: TextBackend) -> None:
    with serving(refusing(503)) as broken:
        servers = [options_for(broken), options_for(stub)]
        pool = ServerPool(language_bundle, servers, PromptWriter(language_bundle), "trtllm")
        try:
            assert pool.name == "trtllm"
            assert say(pool, QUESTION, [picture(1)]) == say(local, QUESTION, [picture(1)])
        finally:
            pool.close()


def request_of(bundle: Bundle, options: GenerationOptions) -> dict[str, object]:
    with serving(answering("yes")) as stub:
        generation = open_trtllm_backend(bundle, options_for(stub)).generate([], [], options)
        with pytest.raises(BackendError, match="a prompt of 31 positions"):
            list(generation)  # the stub counts 31
    return stub.requests[0]


def test_how_to_draw_is_sent(language_bundle: Bundle) -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.1, seed=3)
    options = GenerationOptions(max_tokens=9, stop=("\n",), sampling=sampling)
    request = request_of(language_bundle, options)
    del request["cache_salt"], request["messages"]
    assert request == {
        "model": MODELS["data"][0]["id"],
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ["\n"],
        "stop_token_ids": [2],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert request_of(language_bundle, GenerationOptions())["top_k"] == 1  # greedy


def test_the_form_of_an_answer_is_sent(language_bundle: Bundle) -> None:
    schema = '{"type": "object"}'
    for grammar, expected in (
        (Grammar(choices=("yes", "no")), {"type": "regex", "regex": " ?(yes|no)"}),
        (Grammar(json_schema=schema), {"type": "json", "schema": {"type": "object"}}),
    ):
        request = request_of(language_bundle, GenerationOptions(grammar=grammar))
        assert request["response_format"] == expected


def test_a_server_that_read_another_prompt_is_not_believed(
    language_bundle: Bundle, stand_in: StandIn, stub: Stub
) -> None:
    stand_in._tokenizer.chat_template = (
        "{% for m in messages %}Hello! {% for c in m['content'] %}{% if c['type'] == 'text' %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    backend = open_trtllm_backend(language_bundle, options_for(stub))
    with pytest.raises(BackendError, match=r"prompt of \d+ positions.*export.served_model"):
        say(backend, QUESTION, [picture(1)])


def test_a_refusal_is_told_in_the_server_s_words(language_bundle: Bundle) -> None:
    told = {"object": "error", "message": "prompt too long", "type": "x", "code": 400}
    with serving(lambda handler: handler.send_json(400, told)) as stub:
        backend = open_trtllm_backend(language_bundle, options_for(stub))
        with pytest.raises(BackendError, match=r"\(HTTP 400: prompt too long\)"):
            say(backend, QUESTION, [picture(1)])


def test_why_an_answer_ended(language_bundle: Bundle, stub: Stub) -> None:
    backend = open_trtllm_backend(language_bundle, options_for(stub))
    generation = backend.generate(QUESTION, [picture(1)], GenerationOptions(max_tokens=3))
    text = "".join(generation)
    assert generation.finish == "max_tokens"
    assert backend._writer.tokenizer.decode(generation.token_ids) == text
    assert generation.reused_tokens == 0


def test_an_answer_that_breaks_off_is_told(language_bundle: Bundle) -> None:
    event = {"choices": [{"index": 0, "delta": {"content": "A"}, "finish_reason": None}]}
    with serving(breaking_off(event)) as stub:
        backend = open_trtllm_backend(language_bundle, options_for(stub))
        with pytest.raises(BackendError, match="broke off"):
            say(backend, QUESTION, [picture(1)])


@pytest.mark.parametrize("text", ["bye </s>", "<image>"])
def test_control_tokens_in_words_are_not_sent(language_bundle: Bundle, text: str) -> None:
    with serving() as stub:
        backend = open_trtllm_backend(language_bundle, options_for(stub))
        with pytest.raises(OptionError, match="would obey as a control token"):
            backend.generate([Turn("user", text, images=1)], [picture(1)], GenerationOptions())
        with pytest.raises(BackendError, match="NaN, infinity"):
            backend.generate(QUESTION, [np.full((2, 64), np.nan, np.float32)], GenerationOptions())
        assert stub.requests == []


def with_special_tokens(bundle: Bundle, root: Path, ending: str) -> Bundle:
    """The bundle with a tokenizer that puts <s> before every text, and something after it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    prompt = bundle.manifest.prompt
    tokenizer = Tokenizer.from_file(str(bundle.root / prompt.tokenizer))
    tokens = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(f"<s> $A{ending}", special_tokens=tokens)
    tokenizer.save(str(root / "tokenizer.json"))
    fields = {"prompt": prompt.model_copy(update={"tokenizer": "tokenizer.json"})}
    return replace(bundle, root=root, manifest=bundle.manifest.model_copy(update=fields))


def test_the_first_token_is_left_to_a_tokenizer_that_adds_it(
    language_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = with_special_tokens(language_bundle, tmp_path, "")
    text = ServedText(PromptWriter(bundle), bundle.manifest.prompt).text(QUESTION)
    assert text.startswith("USER: <image>")


def test_a_tokenizer_that_would_spoil_the_prompt_is_refused(
    language_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = with_special_tokens(language_bundle, tmp_path, " </s>")
    with pytest.raises(OptionError, match="would read this conversation as another prompt"):
        ServedText(PromptWriter(bundle), bundle.manifest.prompt).text(QUESTION)
