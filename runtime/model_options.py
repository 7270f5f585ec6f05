"""Which parts of a bundle are loaded and what runs them: options of commands that answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.cli import BackendOption, EngineOption, ThreadsOption, VerifyOption

if TYPE_CHECKING:
    from runtime.model import Model


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
    verify: VerifyOption = True

    def open(self, bundle: str | Path) -> Model:
        """Open a bundle and load what answering takes.

        Raises:
            FoveateError: anything the user can mend.
        """
        from engines.bundle import open_bundle
        from runtime.model import open_model

        return open_model(
            open_bundle(bundle, verify=self.verify),
            backend=self.backend,
            engine=self.engine,
            threads=self.threads,
            visual_tokens=self.visual_tokens,
        )
