"""Serve a bundle over HTTP, as OpenAI's API does: `python -m runtime.serve`."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.cli import JsonOption, print_json
from engines.errors import OptionError
from runtime.server.options import Limits, Listening, ServedParts

if TYPE_CHECKING:
    import uvicorn

    from runtime.server.service import Service

EXAMPLES = (
    "`python -m runtime.serve build/pocket`",
    "`python -m runtime.serve build/pocket --visual-tokens 64 --port 8000`",
    "`FOVEATE_API_KEY=... python -m runtime.serve build/pocket --host 0.0.0.0`",
    "`python -m runtime.serve build/pocket --role encoder --llm-url http://10.0.0.5:8000/v1`",
)
_BACKLOG = 1024
_DRAIN_S = 10


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    *,
    json_output: JsonOption = False,
    parts: ServedParts,
    listening: Listening,
    limits: Limits,
) -> int:
    """Serve a bundle to every OpenAI client, until Ctrl-C or SIGTERM.

    `POST /v1/chat/completions` answers about pictures, streaming or whole; `POST /encode` gives a
    picture's visual tokens; `GET /docs` lists the rest. The log on stderr holds no pictures, no
    questions and no keys. With --json one line on stdout says where it listens.
    """
    uvicorn_server, service, listener, url = start(bundle, parts, listening, limits)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("runtime.server").setLevel(logging.INFO)
    try:
        if json_output:
            print_json({"url": url, "model": service.name, "visual_tokens": service.budgets})
            sys.stdout.flush()
        budgets = ", ".join(map(str, service.budgets))
        print(
            f"{service.name} answers at {url}/v1 with {budgets} visual tokens; {url}/docs says "
            "how. Ctrl-C ends it.",
            file=sys.stderr,
            flush=True,
        )
        with _ending_in_order():
            uvicorn_server.run(sockets=[listener])
    finally:
        service.close()
        listener.close()
    return 0


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let a signal that uvicorn obeyed not end the process a second time."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def start(
    bundle: Path, parts: ServedParts, listening: Listening, limits: Limits
) -> tuple[uvicorn.Server, Service, socket.socket, str]:
    """Load a bundle and open the port; `run` of the server that is returned answers.

    Returns:
        The server, what it serves, its socket and its address.

    Raises:
        FoveateError: anything the user can fix.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise OptionError(
            f"foveate serve needs {error.name}, which is not installed here. Run: pip install "
            "'foveate[serve]'"
        ) from error
    from engines.bundle import open_bundle
    from runtime.server import connections
    from runtime.server.app import make_app
    from runtime.server.service import Service

    listener = _listen(listening)
    try:
        service = Service(open_bundle(bundle, verify=parts.verify), parts, listening, limits)
    except BaseException:
        listener.close()
        raise
    config = uvicorn.Config(
        make_app(service, listening),
        http=connections.timed_protocol(limits.body_s + limits.deadline_s, connections.IDLE_S),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_DRAIN_S,
        limit_concurrency=4 * limits.queue + 256,
    )
    host, port = listener.getsockname()[:2]
    named = f"[{host}]" if ":" in host else host
    return uvicorn.Server(config), service, listener, f"http://{named}:{port}"


def _listen(listening: Listening) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
        listener = socket.create_server(
            (listening.host, listening.port), family=family, backlog=_BACKLOG
        )
    except (OSError, OverflowError) as error:
        raise OptionError(
            f"{listening.host}:{listening.port} cannot be listened on "
            f"({getattr(error, 'strerror', None) or error}). Choose another --port (0: any that is "
            "free) or --host."
        ) from error
    # Each connection inherits it. asyncio sets it on its own listeners only, and without it the
    # pieces of an answer wait up to 40 ms for the client's acknowledgements.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
