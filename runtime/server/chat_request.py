"""The body of a chat completion: OpenAI's fields, checked, as a question to a bundle.

Fields that change an answer and that no bundle can do (tools, several answers, log probabilities)
are refused; others that are unknown are ignored, as other servers do.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.manifest import list_problems
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.prompt import Turn
from runtime.language.sampling import Sampling
from runtime.server.refusals import RefusalError

_SMALLEST_TOP_P = 1e-6
_MOST_TOLD = 5
_MOST_PART_CHARACTERS = 1 << 28
Whole = Annotated[int, Field(ge=1, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class ImageUrl(_Body):
    """Where a picture is: in a data URI, or on a host that the server allows."""

    url: Annotated[str, Field(max_length=_MOST_PART_CHARACTERS)]
    detail: str | None = None
    """Ignored: `visual_tokens` says how closely a picture is looked at."""


class TextPart(_Body):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Body):
    """A picture of a message; it is shown before the message's words."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=1024)]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """The words, a line for each part."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def picture_urls(self) -> list[str]:
        """Where its pictures are."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Body):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class JsonSchema(_Body):
    """A schema that the answer must fit."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Body):
    """What `POST /v1/chat/completions` takes."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    visual_tokens: Whole | None = None
    """Ours: tokens of each picture, one of the budgets that `/v1/metadata` lists."""
    patches: bool = False
    """Ours: also tell which patches of each picture were kept; a stream tells it first."""
    fresh: bool = False
    """Ours: use nothing kept of earlier requests, so that the times are of the whole work."""
    deadline_s: Annotated[float, Field(ge=0.001)] | None = None
    """Ours: give up after so many seconds; the server's own limit holds too."""
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)]
        | Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None


@dataclass(frozen=True)
class Question:
    """What a client wants to know.

    Attributes:
        turns: the conversation, ending with the user.
        picture_urls: its pictures, in the order of the turns.
        generation: how the answer is written.
        visual_tokens: the budget of each picture; None is the server's default.
        stream: answer piece by piece.
        include_usage: end the stream with what it took.
        patches: tell which patches were kept.
        fresh: use neither pictures nor KV caches of earlier requests.
    """

    turns: tuple[Turn, ...]
    picture_urls: tuple[str, ...]
    generation: GenerationOptions
    visual_tokens: int | None
    stream: bool
    include_usage: bool
    patches: bool
    fresh: bool = False


def read_chat_request(body: bytes) -> ChatRequest:
    """Read the JSON of a request.

    Raises:
        RefusalError: it is not JSON, or not what the API takes.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal_of(error) from None


def question_from_request(request: ChatRequest, most_tokens: int) -> Question:
    """Return what a request asks.

    Args:
        request: its body.
        most_tokens: longest answer that the server writes.

    Raises:
        RefusalError: fields that do not go together.
        OptionError: a form of answer or a stop text that cannot be used.
    """
    if request.messages[-1].role != "user":
        raise RefusalError(
            400,
            f"The last message is the {request.messages[-1].role}'s, expected the user's: there is "
            "nothing to answer. End the conversation with a question.",
            "invalid_value",
            "messages",
        )
    turns = tuple(
        Turn(
            "system" if message.role == "developer" else message.role,
            message.text,
            len(message.picture_urls),
        )
        for message in request.messages
    )
    asked = request.max_completion_tokens or request.max_tokens or most_tokens
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return Question(
        turns=turns,
        picture_urls=tuple(url for message in request.messages for url in message.picture_urls),
        generation=GenerationOptions(
            max_tokens=min(asked, most_tokens),
            stop=stop,
            sampling=_sampling(request),
            grammar=_grammar(request.response_format),
        ),
        visual_tokens=request.visual_tokens,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        patches=request.patches,
        fresh=request.fresh,
    )


def _sampling(request: ChatRequest) -> Sampling:
    """Return how tokens are chosen: the likeliest one, unless a temperature is given."""
    seed = secrets.randbits(32) if request.seed is None else request.seed % 2**64
    return Sampling(
        temperature=request.temperature or 0.0,
        top_k=max(request.top_k or 0, 0),
        top_p=max(request.top_p, _SMALLEST_TOP_P) if request.top_p is not None else 1.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        seed=seed,
    )


def _grammar(form: ResponseFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar(json_schema='{"type": "object"}')
    if form.json_schema is None:
        raise RefusalError(
            400,
            "response_format is of the type json_schema and json_schema is missing. Give "
            '{"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}.',
            "missing_field",
            "response_format.json_schema",
        )
    return Grammar(json_schema=json.dumps(form.json_schema.schema_))


def _refusal_of(error: ValidationError) -> RefusalError:
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return RefusalError(400, f"The body is not JSON: {found[0]['msg']}.", "invalid_json")
    problems = list_problems(error)
    more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
    field = ".".join(str(step) for step in found[0]["loc"]) or None
    return RefusalError(
        400, f"The request is wrong: {'; '.join(problems[:_MOST_TOLD])}{more}.", "invalid_value",
        field,
    )  # fmt: skip
