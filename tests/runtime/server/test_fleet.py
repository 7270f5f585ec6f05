"""A server that encodes and lets other servers answer: what is sent, and what a client sees."""

from __future__ import annotations

import base64
import io
import zipfile

import numpy as np
import openai
import pytest

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from runtime.server.options import ServedParts
from tests.runtime.backends.chat_server_stub import (
    Stub,
    answering,
    breaking_off,
    hanging_up,
    piece,
    refusing,
)
from tests.runtime.backends.chat_server_stub import serving as stub_serving
from tests.runtime.server.conftest import asking, picture, serving
from tests.runtime.server.test_encode import ask
from tests.runtime.server.test_limits import wait_until


def urls(*stubs: Stub) -> dict[str, tuple[str, ...]]:
    return {"llm_urls": tuple(stub.url for stub in stubs)}


def test_pictures_are_encoded_here_and_answered_there(language_bundle: Bundle) -> None:
    with (
        stub_serving(answering("a", " red", " cup")) as stub,
        serving(language_bundle.root, port=0, threads=1, role="encoder", **urls(stub)) as served,
    ):
        client = served.client()
        completion = client.chat.completions.create(
            model="tiny", messages=asking("What is it?", picture(1)), max_tokens=9, seed=3
        )
        assert completion.choices[0].message.content == "a red cup"
        assert completion.usage.prompt_tokens == 31  # as the other server counts
        assert completion.usage.prompt_tokens_details.image_tokens == 16
        assert completion.foveate["backend"] == "vllm"
        chunks = client.chat.completions.create(
            model="tiny", messages=asking("What is it?", picture(1)), stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a red cup"
        status, sent, _ = ask(served, "POST", "/encode", picture(1))
        assert status == 200
    (shown,) = [part for part in stub.requests[0]["messages"][0]["content"] if "data" in part]
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(shown["data"]))) as archive:
        halves = np.frombuffer(archive.read("tensor/data/0"), np.float16)
    from safetensors.numpy import load

    np.testing.assert_array_equal(halves.reshape(16, -1), load(sent)["visual_tokens"])
    assert stub.requests[0]["max_tokens"] == 9
    assert stub.requests[0]["seed"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_when_one_server_dies_another_answers(language_bundle: Bundle, stream: bool) -> None:
    broken = breaking_off(piece("all", [10]))
    with (
        stub_serving(hanging_up) as dead,
        stub_serving(broken) as dying,
        stub_serving(answering("all", " good")) as good,
        serving(language_bundle.root, port=0, threads=1, **urls(dead, dying, good)) as served,
    ):
        completion = served.client().chat.completions.create(
            model="tiny", messages=asking("What is it?", picture(1)), stream=stream
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in completion)
        else:
            text = completion.choices[0].message.content
        assert text == "all good"
        assert len(dead.requests) + len(dying.requests) == 2


def test_without_any_server_it_is_not_ready(
    language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.backends.server_pool.CHECK_S", 0.1)
    with (
        stub_serving(refusing(503)) as stub,
        stub_serving(refusing(503)) as other,
        serving(language_bundle.root, port=0, threads=1, **urls(stub, other)) as served,
    ):
        assert ask(served, "GET", "/v1/health/ready")[0] == 200
        with pytest.raises(openai.APIStatusError) as told:
            served.client().chat.completions.create(model="tiny", messages=asking("Hello"))
        assert told.value.status_code == 502
        assert told.value.body["code"] == "backend_failed"
        stub.models = other.models = "gone"
        wait_until(lambda: ask(served, "GET", "/v1/health/ready")[0] == 503)
        assert ask(served, "GET", "/v1/health/live")[0] == 200
        assert ask(served, "POST", "/encode", picture(1))[0] == 200


def test_an_encoder_alone_only_encodes(language_bundle: Bundle) -> None:
    with serving(language_bundle.root, port=0, threads=1, role="encoder") as served:
        assert ask(served, "POST", "/encode", picture(1))[0] == 200
        with pytest.raises(openai.NotFoundError, match="has no language model"):
            served.client().chat.completions.create(model="tiny", messages=asking("Hello"))


def test_tokens_that_are_no_numbers_reach_no_server(
    language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        stub_serving(answering("a")) as stub,
        serving(language_bundle.root, port=0, threads=1, **urls(stub)) as served,
    ):
        encoder = served.service._graphs.encoder(served.service.budgets[0])
        run = encoder.session.run

        def overflowing(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = run(inputs)
            return {**outputs, "visual_tokens": outputs["visual_tokens"] + np.float32(1e6)}

        monkeypatch.setattr(encoder.session, "run", overflowing)
        with pytest.raises(openai.InternalServerError, match="were not sent"):
            served.client().chat.completions.create(
                model="tiny", messages=asking("What?", picture(2))
            )
        status, body, _ = ask(served, "POST", "/encode", picture(2))
        assert status == 500
        assert b"were not sent" in body
        assert not stub.requests


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(OptionError, match="--llm-model needs"):
        ServedParts(llm_model="x")
    with pytest.raises(OptionError, match="loads no language model"):
        ServedParts(role="encoder", backend="ort")
    with pytest.raises(OptionError, match="one of all, encoder"):
        ServedParts(role="decoder")  # type: ignore[arg-type]


def test_a_server_that_is_not_there_is_told_at_once(language_bundle: Bundle) -> None:
    with (
        pytest.raises(BackendError, match="No answer from http://127"),
        serving(
            language_bundle.root,
            port=0,
            role="encoder",
            llm_urls=("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"),
        ),
    ):
        pass
