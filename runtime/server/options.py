"""Options of a server: what it serves, where it listens and what a request may take."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engines.cli import (
    BackendOption,
    ContextOption,
    EngineOption,
    PositionsOption,
    ThreadsOption,
    VerifyOption,
    VisualWeightsOption,
)
from engines.errors import OptionError
from engines.llm_words import SERVERS
from engines.option_groups import Typed
from engines.secret import NO_SECRET, Secret

if TYPE_CHECKING:
    from runtime.backends.chat_server import ServerOptions

Role = Literal["all", "encoder"]


@dataclass(frozen=True)
class ServedParts:
    """What is served: the parts of the bundle, and what runs them.

    Attributes:
        role: ``encoder`` loads no language model: servers at ``llm_urls`` answer, if there are any.
        visual_tokens: budgets that a request may choose among, the first one its default; empty is
            all that the bundle holds.
        llm_urls: servers that run the language model; another one is asked when one fails.
    """

    role: Annotated[
        Role,
        typer.Option(
            help="all, or encoder: encode pictures here and let --llm-url answer; without one, "
            "serve /encode alone."
        ),
    ] = "all"
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; left out, the bundle's name.")
    ] = None
    visual_tokens: Annotated[
        tuple[int, ...],
        typer.Option(
            "--visual-tokens",
            help="A budget that requests may choose; may be given again, the first one is the "
            "default. Left out, all that the bundle holds.",
        ),
        Typed(tuple, list, list[int]),
    ] = ()
    backend: BackendOption = None
    engine: EngineOption = None
    threads: ThreadsOption = None
    context_length: ContextOption = None
    positions: PositionsOption = "compact"
    visual_weights: VisualWeightsOption = "equal"
    verify: VerifyOption = True
    llm_urls: Annotated[
        tuple[str, ...],
        typer.Option(
            "--llm-url",
            help="Address of a server that runs the language model, vLLM unless --backend says "
            "trtllm; may be given again: when one does not answer, the next is asked.",
        ),
        Typed(tuple, list, list[str]),
    ] = ()
    llm_model: Annotated[
        str | None,
        typer.Option("--llm-model", help="The servers' name for it; left out, their only one."),
    ] = None
    llm_api_key: Annotated[
        Secret | None,
        typer.Option(
            "--llm-api-key",
            envvar="FOVEATE_LLM_API_KEY",
            parser=Secret,
            metavar="TEXT",
            help="The key of the servers at --llm-url.",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.role not in ("all", "encoder"):
            raise OptionError(f"--role {self.role}: expected one of all, encoder.")
        if self.llm_model is not None and not self.llm_urls:
            raise OptionError("--llm-model needs the servers' address: --llm-url.")
        if self.role == "encoder" and self.backend not in (None, *SERVERS):
            raise OptionError(
                f"--role encoder loads no language model here, and --backend {self.backend} is "
                "one. Leave one of them out."
            )

    def servers(self, deadline_s: float) -> list[ServerOptions]:
        """Return how to reach each server of the language model.

        Raises:
            OptionError: an address that is none.
        """
        from runtime.backends.chat_server import ServerOptions

        alone = len(self.llm_urls) == 1
        return [
            ServerOptions(
                url,
                self.llm_api_key or None,
                self.llm_model,
                silence_seconds=min(60.0, deadline_s),
                answer_seconds=deadline_s,
                attempts=4 if alone else 1,
            )
            for url in self.llm_urls
        ]


@dataclass(frozen=True)
class Listening:
    """Where it listens, and who may ask.

    Attributes:
        host: an address of this machine; one that others reach needs a key.
        port: 0 takes any that is free.
        api_key: what clients send as a bearer token; None lets everyone ask who reaches it.
        allow_urls: hosts that pictures may be fetched from, as ``HOST`` or ``HOST:PORT``.
    """

    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the loopback needs --api-key.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0: any that is free.")] = 8600
    api_key: Annotated[
        Secret | None,
        typer.Option(
            "--api-key",
            envvar="FOVEATE_API_KEY",
            parser=Secret,
            metavar="TEXT",
            help="What clients must send as a bearer token; on the command line others can see it.",
        ),
    ] = None
    allow_urls: Annotated[
        tuple[str, ...],
        typer.Option(
            "--allow-url",
            metavar="HOST",
            help="Host (or HOST:PORT) that pictures may be fetched from; may be given again. "
            "Without it only pictures in the request itself are taken.",
        ),
        Typed(tuple, list, list[str]),
    ] = ()

    def __post_init__(self) -> None:
        self.key.require_sendable("The API key (--api-key or FOVEATE_API_KEY)")
        if not self.on_loopback and not self.key:
            raise OptionError(
                f"--host {self.host} can be reached from other machines, and no key is set: anyone "
                "could ask. Set FOVEATE_API_KEY (or --api-key), or listen on 127.0.0.1."
            )

    @property
    def key(self) -> Secret:
        """The key; an empty one where none is needed."""
        return self.api_key or NO_SECRET

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Limits:
    """What requests may take, each and together.

    Attributes:
        queue: requests that wait or are answered at once; one more is refused with 429.
        parallel: answers written at once; None is 2 here, 1 with llama.cpp and 32 on a server.
        conversations: KV caches that are kept; the one unused longest goes first.
        batch: most pictures encoded at once; None is 8 on a GPU and 1 on a CPU, where it is faster.
        deadline_s: seconds of one request, from its first byte to the end of its answer.
        body_s: seconds for sending the request's body.
        max_body_bytes: of one request.
        max_pixels: of one picture.
        max_pictures: of one request.
        max_tokens: of one answer; a request for more gets this many.
        remembered_bytes: visual tokens of pictures seen lately, so that the next question of a
            conversation does not encode its pictures again; 0 keeps none.
    """

    queue: Annotated[int, typer.Option(min=1, help="Requests at once; one more gets 429.")] = 128
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Answers written at once; left out, 2 (llama.cpp: 1, on a server: 32)."
        ),
    ] = None
    conversations: Annotated[
        int, typer.Option(min=1, help="KV caches kept; the longest unused one goes first.")
    ] = 8
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most pictures encoded at once; left out, 8 on a GPU, else 1."),
    ] = None
    deadline_s: Annotated[
        float, typer.Option("--deadline", min=0.1, max=86400.0, help="Seconds a request may take.")
    ] = 120.0
    body_s: Annotated[
        float,
        typer.Option(
            "--body-time", min=0.1, max=3600.0, help="Seconds in which its body must arrive."
        ),
    ] = 30.0
    max_body_bytes: Annotated[
        int, typer.Option("--max-body", min=1000, help="Bytes of one request.")
    ] = 32_000_000
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, help="Pixels of one picture.")
    ] = 25_000_000
    max_pictures: Annotated[
        int, typer.Option("--max-pictures", min=1, help="Pictures in one request.")
    ] = 16
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of one answer, at most.")
    ] = 1024
    remembered_bytes: Annotated[
        int,
        typer.Option(
            "--remember", min=0, help="Bytes of visual tokens kept of pictures seen lately."
        ),
    ] = 256_000_000
