"""OpenAI's own client against a real server with real graphs: its examples run unchanged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from runtime.language.generate import GenerationOptions
from runtime.model import open_model
from runtime.vision.pictures import load_picture
from tests.runtime.server.conftest import POCKET, Served, asking, data_uri, picture, questions

MODEL = "pocket-llava"


def test_the_client_finds_the_model(client: openai.OpenAI, server: Served) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL
    assert model.model_dump()["visual_tokens"] == [64, 16, 576]


def test_a_vision_question_is_answered_as_the_runtime_answers_it(
    client: openai.OpenAI, server: Served
) -> None:
    with open_model(server.service.bundle, threads=1) as model:
        for file, question, _ in questions()[:40:8]:
            expected = model.ask(load_picture(file), question)
            completion = client.chat.completions.create(
                model=MODEL, messages=asking(question, file)
            )
            (choice,) = completion.choices
            assert choice.message.content == expected.text
            assert choice.finish_reason == "stop"
            usage = completion.usage
            assert usage.prompt_tokens == expected.prompt_tokens
            assert usage.completion_tokens == len(expected.token_ids)
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            assert usage.prompt_tokens_details.image_tokens == 64


def test_most_answers_are_right(client: openai.OpenAI) -> None:
    asked = questions()[::100]
    right = sum(
        client.chat.completions.create(
            model=MODEL, messages=asking(question, file), extra_body={"visual_tokens": 576}
        )
        .choices[0]
        .message.content
        == answer
        for file, question, answer in asked
    )
    assert right / len(asked) > 0.8


def test_a_stream_has_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    messages = asking("List the objects from left to right.", POCKET / "test" / "00000.png")
    whole = client.chat.completions.create(model=MODEL, messages=messages)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.image_tokens == 64
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_usage(client: openai.OpenAI) -> None:
    messages = asking("How many boxes are there?", POCKET / "test" / "00000.png")
    chunks = list(client.chat.completions.create(model=MODEL, messages=messages, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_text_alone_and_a_conversation(client: openai.OpenAI) -> None:
    file = POCKET / "test" / "00000.png"
    messages: list[Any] = asking("How many boxes are there?", file)
    first = client.chat.completions.create(model=MODEL, messages=messages)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Is there a red box?"},
    ]
    second = client.chat.completions.create(model=MODEL, messages=messages)
    details = second.usage.prompt_tokens_details
    # Only the answer's end and the new question were computed.
    assert details.cached_tokens >= first.usage.prompt_tokens
    assert second.choices[0].message.content in {"yes", "no"}
    alone = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Is there a red box?"}]
    )
    assert alone.usage.prompt_tokens_details.image_tokens == 0


@pytest.mark.parametrize("tokens", [16, 64, 576])
def test_the_request_chooses_the_budget(client: openai.OpenAI, tokens: int) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=asking("How many boxes are there?", POCKET / "test" / "00001.png"),
        extra_body={"visual_tokens": tokens, "patches": True},
    )
    assert completion.usage.prompt_tokens_details.image_tokens == tokens
    (seen,) = completion.foveate["pictures"]
    assert seen["budget"] == tokens
    assert len(seen["assignment"]) == 24 * 24
    assert seen["box"] == [0.0, 0.0, seen["height"], seen["width"]]
    assert all(0 <= row < 24 and 0 <= column < 24 for row, column in seen["kept"])


def test_several_pictures(client: openai.OpenAI) -> None:
    files = [POCKET / "test" / f"0000{number}.png" for number in range(3)]
    completion = client.chat.completions.create(
        model=MODEL, messages=asking("What is there?", *files), extra_body={"visual_tokens": 16}
    )
    assert completion.usage.prompt_tokens_details.image_tokens == 48
    assert completion.foveate["visual_tokens"] == [16, 16, 16]


def test_stop_and_lengths(talker: Served) -> None:
    client = talker.client()
    ask: dict[str, Any] = {"model": "tiny", "messages": asking("Hello", picture(1))}
    long = client.chat.completions.create(**ask, max_tokens=40)
    text = long.choices[0].message.content
    assert long.choices[0].finish_reason == "length"
    assert long.usage.completion_tokens == 40
    newer = client.chat.completions.create(**ask, max_completion_tokens=12)
    assert newer.usage.completion_tokens == 12
    assert text.startswith(newer.choices[0].message.content.rstrip("\ufffd"))
    stop = text[10:13]
    stopped = client.chat.completions.create(**ask, max_tokens=40, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    several = client.chat.completions.create(**ask, max_tokens=40, stop=["never said", stop])
    assert several.choices[0].message.content == text[: text.index(stop)]


def test_sampling_is_repeatable_by_its_seed(talker: Served) -> None:
    client = talker.client()

    def say(**options: Any) -> str:
        return (
            client.chat.completions.create(
                model="tiny", messages=asking("Hello", picture(1)), max_tokens=30, **options
            )
            .choices[0]
            .message.content
        )

    assert say(temperature=1.5, seed=4) == say(temperature=1.5, seed=4)
    assert say(temperature=1.5, seed=4) != say(temperature=1.5, seed=-5)
    assert say(temperature=1.5) != say(temperature=1.5)
    assert say(temperature=0) == say() == say(temperature=1.5, top_p=0, seed=4)


def test_json_schema_and_json_object(talker: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"door": {"enum": ["open", "shut"]}, "count": {"type": "boolean"}},
        "required": ["door", "count"],
        "additionalProperties": False,
    }
    client = talker.client()
    ask: dict[str, Any] = {"model": "tiny", "messages": asking("Hello", picture(1))}
    completion = client.chat.completions.create(
        **ask,
        response_format={"type": "json_schema", "json_schema": {"name": "door", "schema": schema}},
    )
    said = json.loads(completion.choices[0].message.content)
    assert said["door"] in ("open", "shut")
    assert isinstance(said["count"], bool)
    assert completion.choices[0].finish_reason == "stop"
    free = client.chat.completions.create(
        **ask, response_format={"type": "json_object"}, max_tokens=30, temperature=1, seed=1
    )
    assert free.choices[0].message.content.startswith("{")


def test_the_same_options_as_the_runtime(talker: Served) -> None:
    file = picture(3)
    completion = talker.client().chat.completions.create(
        model="tiny", messages=asking("Hello", file), max_tokens=25
    )
    with open_model(talker.service.bundle, threads=1) as model:
        import io

        pixels = np.asarray(Image.open(io.BytesIO(file)))
        answer = model.ask(pixels, "Hello", GenerationOptions(max_tokens=25))
    assert completion.choices[0].message.content == answer.text


def test_words_before_or_after_a_picture_are_the_same(client: openai.OpenAI) -> None:
    """OpenAI's clients put the picture last, and LLaVA's template puts it first."""
    (message,) = asking("How many boxes are there?", POCKET / "test" / "00002.png")
    turned = [{**message, "content": message["content"][::-1]}]
    first = client.chat.completions.create(model=MODEL, messages=[message])
    second = client.chat.completions.create(model=MODEL, messages=turned)
    assert second.usage.prompt_tokens == first.usage.prompt_tokens
    assert second.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "status", "code", "words"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found", "only 'pocket-llava'"),
        ({"n": 2}, 400, "invalid_value", "n is 2, expected one of 1"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value", "last mess"),
        ({"messages": asking("x", b"not a picture")}, 400, "invalid_value", "not a picture"),
        ({"messages": asking("x" * 200_000)}, 400, "context_length_exceeded", "200,000 char"),
        ({"messages": asking("boxes " * 3000)}, 400, "context_length_exceeded", "3,0"),
        (
            {"messages": asking("x", *[POCKET / "test" / "00000.png"] * 4)}
            | {"extra_body": {"visual_tokens": 576}},
            400,
            "context_length_exceeded",
            "2,304 of them visual",
        ),
        ({"messages": asking("x", *[b"x"] * 17)}, 400, "too_many_pictures", "17 pictures"),
        ({"extra_body": {"visual_tokens": 20}}, 400, "unknown_budget", "one of 16, 64, 576"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None, "tools"),
        ({"logprobs": True}, 400, "invalid_value", "logprobs"),
        ({"stop": ""}, 400, "invalid_value", "stop string is empty"),
        ({"response_format": {"type": "json_schema"}}, 400, "missing_field", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "?"}}}},
            400,
            "invalid_value",
            "form of the answer",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_told_what_is_wrong(
    client: openai.OpenAI, changes: dict[str, Any], status: int, code: str, words: str, stream: bool
) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": asking("Is it?"), "stream": stream}
    with pytest.raises(openai.APIStatusError) as told:
        client.chat.completions.create(**{**request, **changes})
    assert told.value.status_code == status
    error = told.value.body
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:22/x.png", "url_not_allowed"),
        ("https://example.org/x.png", "url_not_allowed"),
        ("file:///etc/passwd", "invalid_url"),
        ("http://user:word@example.org/", "invalid_url"),
        ("data:image/png,abc", "invalid_data_uri"),
        ("data:image/png;base64,!!!", "invalid_data_uri"),
        ("", "invalid_url"),
        ("http://[::1", "invalid_url"),
    ],
)
def test_pictures_from_elsewhere_are_refused(client: openai.OpenAI, url: str, code: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    assert told.value.body["code"] == code


def test_a_form_that_the_vocabulary_cannot_write_is_told(client: openai.OpenAI) -> None:
    """The bundled checkpoint has no braces."""
    with pytest.raises(openai.APIStatusError) as told:
        client.chat.completions.create(
            model=MODEL, messages=asking("Is it?"), response_format={"type": "json_object"}
        )
    assert told.value.status_code in (400, 422)
    assert "vocabulary" in told.value.body["message"]


def test_a_picture_of_another_kind(client: openai.OpenAI) -> None:
    import io

    file = io.BytesIO()
    Image.open(POCKET / "test" / "00000.png").convert("RGB").save(file, "JPEG", quality=95)
    url = data_uri(file.getvalue(), "image/jpeg")
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
                    {"type": "text", "text": "How many objects are there?"},
                ],
            }
        ],
    )
    assert completion.choices[0].message.content == "four"


def test_a_fresh_question_uses_nothing_kept_of_earlier_ones(client: openai.OpenAI) -> None:
    messages = asking("How many boxes are there?", POCKET / "test" / "00004.png")
    told = [
        client.chat.completions.create(model=MODEL, messages=messages, extra_body={"fresh": fresh})
        for fresh in (False, False, True)
    ]
    _, again, fresh = told
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.foveate["milliseconds"]["encode"] == 0
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0
    assert fresh.foveate["milliseconds"]["encode"] > 0
    assert len({one.choices[0].message.content for one in told}) == 1


def test_a_stream_tells_the_kept_patches_first(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=asking("How many boxes are there?", POCKET / "test" / "00004.png"),
            stream=True,
            extra_body={"patches": True, "visual_tokens": 16},
        )
    )
    (seen,) = chunks[0].model_dump()["foveate"]["pictures"]
    assert seen["budget"] == 16
    assert len(seen["assignment"]) == 24 * 24
