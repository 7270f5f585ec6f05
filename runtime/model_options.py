"""Options of which parts of a bundle are loaded and what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.cli import (
    BackendOption,
    ContextOption,
    EngineOption,
    KvCacheOption,
    PositionsOption,
    ThreadsOption,
    VerifyOption,
    VisualWeightsOption,
)
from engines.errors import OptionError
from engines.llm_words import LlmDevice
from engines.memory.context_length import ContextNeed
from engines.secret import Secret

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from runtime.backends.chat_server import ServerOptions
    from runtime.model import Model

SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="Instructions before the question, if the model takes them."),
]


@dataclass(frozen=True)
class ModelOptions:
    """How a bundle is loaded; the help of each option says what it means."""

    backend: BackendOption = None
    engine: EngineOption = None
    threads: ThreadsOption = None
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            "--visual-tokens",
            min=1,
            help="Which vision graph, of a bundle with several; left out, the first.",
        ),
    ] = None
    context_length: ContextOption = None
    kv_cache: KvCacheOption = "f16"
    positions: PositionsOption = "compact"
    visual_weights: VisualWeightsOption = "equal"
    device: Annotated[
        LlmDevice | None,
        typer.Option(
            "--llm-device",
            help="Where ONNX Runtime computes the language model: cpu or cuda; left out, where "
            "export.build --llm-device built it for.",
        ),
    ] = None
    verify: VerifyOption = True
    llm_url: Annotated[
        str | None,
        typer.Option(
            "--llm-url",
            help="Address of a server that runs the language model, vLLM unless --backend says "
            "trtllm: http://127.0.0.1:8000/v1.",
        ),
    ] = None
    llm_model: Annotated[
        str | None,
        typer.Option("--llm-model", help="The server's name for it; left out, its only one."),
    ] = None
    api_key: Annotated[
        Secret | None,
        typer.Option(
            "--api-key",
            envvar="FOVEATE_API_KEY",
            parser=Secret,
            metavar="TEXT",
            help="The server's key; on the command line others can see it.",
        ),
    ] = None
    llm_timeout: Annotated[
        float,
        typer.Option(
            "--llm-timeout",
            min=0.1,
            max=86400.0,
            help="Seconds to wait for the next piece of a server's answer.",
        ),
    ] = 60.0
    llm_deadline: Annotated[
        float,
        typer.Option(
            "--llm-deadline",
            min=0.1,
            max=86400.0,
            help="Seconds to wait for the whole of a server's answer.",
        ),
    ] = 600.0

    def open_bundle(self, path: str | Path) -> Bundle:
        """Open a bundle and load nothing of it.

        Raises:
            FoveateError: anything the user can fix.
        """
        from engines.bundle import open_bundle

        self.server()  # first: a wrong address is refused at once
        return open_bundle(path, verify=self.verify)

    def open(
        self, bundle: str | Path | Bundle, batch: int = 1, need: ContextNeed = ContextNeed()
    ) -> Model:
        """Open a bundle and load what answering takes.

        Args:
            bundle: its directory, or what `open_bundle` returned.
            batch: images that are usually encoded at once; see `engines.open_session`.
            need: what the KV cache has to hold, where no length is given.

        Raises:
            FoveateError: anything the user can fix.
        """
        from runtime.model import open_model

        if isinstance(bundle, (str, Path)):
            bundle = self.open_bundle(bundle)
        return open_model(
            bundle,
            backend=self.backend,
            engine=self.engine,
            threads=self.threads,
            visual_tokens=self.visual_tokens,
            context_length=self.context_length,
            need=need,
            kv_cache=self.kv_cache,
            positions=self.positions,
            visual_weights=self.visual_weights,
            device=self.device,
            server=self.server(),
            batch=batch,
        )

    def server(self) -> ServerOptions | None:
        """Return how to reach the server, if one is named.

        Raises:
            OptionError: an address that is none, or options of a server without an address.
        """
        from runtime.backends.chat_server import ServerOptions

        if self.llm_url is None:
            if self.llm_model is not None:
                raise OptionError("--llm-model needs the server's address: --llm-url.")
            return None
        return ServerOptions(
            self.llm_url,
            self.api_key or None,
            self.llm_model,
            silence_seconds=self.llm_timeout,
            answer_seconds=self.llm_deadline,
        )
