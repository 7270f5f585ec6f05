"""The routes of the server: Chat Completions, pictures to visual tokens, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from engines.errors import FoveateError
from engines.version import __version__
from runtime.model import Answer
from runtime.server.admission import Admission
from runtime.server.answering import Prefilled
from runtime.server.chat_documents import Completion, event
from runtime.server.chat_request import (
    ChatRequest,
    Question,
    question_from_request,
    read_chat_request,
)
from runtime.server.options import Listening
from runtime.server.pages import SECURITY_HEADERS, PageFiles, live_page, reference_page
from runtime.server.refusals import ClientGoneError, RefusalError, refusal_of
from runtime.server.service import Service
from runtime.server.ticket import Ticket

_DESCRIPTION = (
    "A vision-language model that is shown each picture as a few tokens. Any OpenAI client can ask "
    "it: base_url is this address with /v1."
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request is wrong; the message says what.",
        401: "The key is missing or wrong.",
        403: "Another host or web site asks.",
        404: "No such path or model.",
        405: "The path takes another method.",
        408: "The body came too slowly, or the deadline that the client chose passed.",
        413: "The body is too large.",
        415: "The body is of another kind.",
        422: "The model cannot keep to the form asked for.",
        429: "The queue is full; Retry-After says when to come back.",
        504: "The deadline passed.",
    }.items()
}
_PICTURE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}
_GONE = RefusalError(499, "The client closed the connection.", "client_gone")


def make_app(service: Service, listening: Listening) -> FastAPI:
    """Return the application that serves ``service``."""
    app = FastAPI(
        title=f"Foveate: {service.name}",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    _add_answers(app, service)
    _add_encoding(app, service)
    _add_state(app, service)
    _add_pages(app, service)
    _tell_errors_as_openai(app)
    app.add_middleware(
        Admission,
        listening=listening,
        limits=service.limits,
        counters=service.counters,
    )
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> dict[str, Any]:
        """Tell of the model."""
        _check_model(service, name)
        return _model(service)

    @app.post("/v1/chat/completions", responses=_ERRORS, openapi_extra=_CHAT_BODY)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation about pictures, as OpenAI's API does.

        Pictures are shown before the words of their message. `visual_tokens` chooses how many
        tokens each of them has. A temperature that is left out is 0.
        """
        ticket = Ticket(service.limits.deadline_s)
        _require_kind(request, ("application/json",))
        body = await request.body()
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(None, read_chat_request, body)
        del body
        _check_model(service, asked.model)
        ticket.shorten(asked.deadline_s)
        question = question_from_request(asked, service.limits.max_tokens)
        if question.stream:
            return await _stream(service, request, question, ticket)
        return await ticket.wait_for(_whole(service, question, ticket), request.receive)


async def _whole(service: Service, question: Question, ticket: Ticket) -> Response:
    pictures = await service.see(question, ticket)
    completion = Completion(service.name, service.bundle, pictures, question.patches)
    async for item in service.write(question, pictures, ticket):
        if isinstance(item, Answer):
            service.counters.observe_answer(item, sum(one.count for one in pictures))
            return JSONResponse(completion.whole(item, ticket))
    raise RuntimeError("an answer ended without its end")


async def _stream(
    service: Service, request: Request, question: Question, ticket: Ticket
) -> Response:
    """Answer once the prompt was read, so that what is wrong with it has a status of its own."""
    pictures = await ticket.wait_for(service.see(question, ticket), request.receive)
    completion = Completion(service.name, service.bundle, pictures, question.patches)
    items = service.write(question, pictures, ticket)
    await ticket.wait_for(_first(items), request.receive)

    async def events() -> AsyncIterator[bytes]:
        try:
            yield completion.first_event()
            async for item in items:
                if isinstance(item, str):
                    yield completion.piece_event(item)
                elif isinstance(item, Answer):
                    service.counters.observe_answer(item, sum(one.count for one in pictures))
                    yield completion.last_events(item, ticket, question.include_usage)
        except asyncio.CancelledError:
            service.counters.cancelled.inc()
            raise
        except RefusalError as refusal:
            yield event(refusal.document)
        finally:
            ticket.give_up()

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _first(items: AsyncIterator[Any]) -> None:
    if not isinstance(await items.__anext__(), Prefilled):
        raise RuntimeError("an answer began before its prompt was read")


def _add_encoding(app: FastAPI, service: Service) -> None:
    @app.post("/encode", responses=_ERRORS, openapi_extra=_PICTURE_BODY)
    async def encode(
        request: Request,
        visual_tokens: Annotated[
            int | None, Query(ge=1, lt=2**31, description="One of the budgets of /v1/metadata.")
        ] = None,
        format: Annotated[
            Literal["safetensors", "json"],
            Query(description="The tokens as a file, or which patches were kept as JSON."),
        ] = "safetensors",
    ) -> Response:
        """Encode one picture file into visual tokens.

        The body is the file (JPEG, PNG, WebP, ...), of the content type image/* or
        application/octet-stream. The answer is a safetensors file with `visual_tokens`
        float16[N, D], `patch_index` int64[N] and `assignment` int64[P]; with `format=json` it is
        the grid positions of the kept patches and the time of each stage.
        """
        ticket = Ticket(service.limits.deadline_s)
        _require_kind(request, ("application/octet-stream", "image/"))
        tokens = service.budget(visual_tokens)
        data = await request.body()
        seen = await ticket.wait_for(service.look(data, tokens, ticket), request.receive)
        if format == "json":
            return JSONResponse(seen.document(service.bundle))
        spent = {name: round(ms, 3) for name, ms in seen.milliseconds.items()}
        timing = ", ".join(f"{name};dur={ms}" for name, ms in spent.items())
        return Response(
            seen.safetensors(service.bundle),
            media_type="application/octet-stream",
            headers={"Server-Timing": timing, "X-Visual-Tokens": str(seen.count)},
        )


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/health/live", responses=_ERRORS)
    async def live() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "live"}

    @app.get("/v1/health/ready", responses={**_ERRORS, 503: {"description": "It cannot answer."}})
    async def ready() -> Response:
        """Say whether a question would be answered now."""
        problem = service.problem
        document = {"status": "ready"} if problem is None else {"status": problem}
        return JSONResponse(document, 200 if problem is None else 503)

    @app.get("/v1/metadata", responses=_ERRORS)
    async def metadata() -> dict[str, Any]:
        """Tell of the bundle: its budgets, its reducer, its grid of patches, its limits."""
        return service.metadata()

    @app.get("/metrics", responses=_ERRORS)
    async def metrics() -> Response:
        """Return counts and times as Prometheus text."""
        return Response(service.counters.text(), media_type=CONTENT_TYPE_LATEST)


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return _openapi(app, service)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(_openapi(app, service)), headers=SECURITY_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return live_page()

    app.mount("/static", PageFiles(), name="static")


def _openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    """Return the OpenAPI document, with the schema of what we read ourselves."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["properties"]["model"]["enum"] = [service.name]
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas |= {**schema.pop("$defs"), "ChatRequest": schema}
        for methods in document["paths"].values():
            for told in methods.values():
                told["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema


def _tell_errors_as_openai(app: FastAPI) -> None:
    def answering(
        read: Callable[[Any], RefusalError],
    ) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(_: Request, error: Exception) -> Response:
            refusal = read(error)
            return JSONResponse(refusal.document, refusal.status, refusal.headers)

        return handle

    app.add_exception_handler(RefusalError, answering(lambda error: error))
    app.add_exception_handler(FoveateError, answering(refusal_of))
    app.add_exception_handler(RequestValidationError, answering(_of_parameters))
    app.add_exception_handler(HTTPException, answering(_of_http))
    for gone in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(gone, answering(lambda _: _GONE))
    app.add_exception_handler(
        Exception,
        answering(
            lambda error: RefusalError(
                500, f"A defect of the server ({type(error).__name__}); its log has more.", "defect"
            )
        ),
    )


def _of_parameters(error: RequestValidationError) -> RefusalError:
    told = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
    return RefusalError(400, f"The address is wrong: {'; '.join(told)}.", "invalid_value")


def _of_http(error: HTTPException) -> RefusalError:
    return RefusalError(
        error.status_code, f"{error.detail}. /docs lists what there is.", "not_found"
    )


def _require_kind(request: Request, kinds: tuple[str, ...]) -> None:
    """Check the content type: a page of another web site cannot send these unasked."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not kind.startswith(kinds):
        raise RefusalError(
            415,
            f"The body is of the type {kind[:100] or 'none'!r}, expected "
            f"{' or '.join(one + '*' if one.endswith('/') else one for one in kinds)}.",
            "wrong_content_type",
        )


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "foveate",
        "max_model_len": service.context_length,
        "visual_tokens": list(service.budgets),
    }


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise RefusalError(
            404,
            f"There is no model {name[:100]!r} here, only {service.name!r}. GET /v1/models lists "
            "it; --name calls it otherwise.",
            "model_not_found",
            "model",
        )
