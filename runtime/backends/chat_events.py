"""Check the JSON of a chat server's events and model lists, and return typed values.

A field of another type, a negative count or a number too large ends the answer with a
`BackendError`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from engines.errors import BackendError
from engines.secret import NO_SECRET, Secret

Count = Annotated[int, Field(ge=0, lt=2**31)]
_SHOWN_CHARACTERS = 300


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Delta(_Document):
    """What an event adds to the answer."""

    content: str | None = None


class Choice(_Document):
    """One answer of those that a request may ask for; we ask for one."""

    delta: Delta | None = None
    token_ids: list[Count] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class PromptDetails(_Document):
    """What the server says of the prompt, where it was started to say it."""

    cached_tokens: Count | None = None


class Usage(_Document):
    """What an answer took."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: PromptDetails | None = None


class Event(_Document):
    """One event of an answer."""

    choices: list[Choice] = Field(default=[], max_length=1)
    usage: Usage | None = None
    error: Any = None


class ServedModel(_Document):
    """A language model that a server has."""

    id: str
    max_model_len: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class ModelList(_Document):
    """All of them."""

    data: list[ServedModel]


def read_event(data: str, url: str, key: Secret) -> Event:
    """Return what an event says.

    Args:
        data: the event, as JSON.
        url: who sent it.
        key: taken out of what is shown of it.

    Raises:
        BackendError: it is none, or tells of an error.
    """
    try:
        event = Event.model_validate_json(data)
    except ValidationError as error:
        raise BackendError(
            f"{url} sent {shown(key.redact(data)[:200])!r} in the middle of an answer, "
            f"{first_problem(error)}. Expected an event of Chat Completions. The conversation is "
            "unchanged: ask again. If it happens again, look at what serves this address."
        ) from None
    if event.error is not None:
        raise BackendError(
            f"{url} failed in the middle of an answer ({server_message(data, key)}). Ask again; "
            "if it happens again, look at the server's log."
        )
    return event


def read_models(body: str, url: str, key: Secret) -> list[ServedModel]:
    """Return the models that a server lists; see `read_event`.

    Raises:
        BackendError: it is no such list.
    """
    try:
        return ModelList.model_validate_json(body).data
    except ValidationError as error:
        raise BackendError(
            f"{url} answers, but not with a list of models: {shown(key.redact(body)[:80])!r}, "
            f"{first_problem(error)}. Expected a server that speaks OpenAI's API, such as "
            "`vllm serve`."
        ) from None


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a document, without what it holds."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return "which is not JSON"
    if not first["loc"]:
        return "expected a JSON object"
    return shown(f"where {'.'.join(map(str, first['loc']))} is wrong: {first['msg']}")


def server_message(body: str, key: Secret) -> str:
    """Return a server's own words from an error document, or the beginning of what it sent."""
    try:
        document: Any = from_json(body)
        said: Any = document.get("error", document)  # TensorRT-LLM sends the error without a frame
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        said = body
    return shown(said, key) or "no reason given"


def shown(said: object, key: Secret = NO_SECRET) -> str:
    """Return what a server said as one short line that is safe to print, without the key."""
    words = " ".join(key.redact(said if isinstance(said, str) else repr(said)).split())
    printable = "".join(letter if letter.isprintable() else "?" for letter in words)
    too_long = len(printable) > _SHOWN_CHARACTERS
    return printable[:_SHOWN_CHARACTERS] + " ..." if too_long else printable
