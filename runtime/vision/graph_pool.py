"""The budgets of visual tokens of one bundle, loaded when first used and what they share once."""

from __future__ import annotations

from contextlib import AbstractContextManager

from engines.bundle import Bundle
from runtime.vision.encoder import VisionEncoder


class GraphPool(AbstractContextManager["GraphPool"]):
    """Encoders by their number of visual tokens; use it as a context manager.

    Attributes:
        bundle: from `open_bundle`.
        budgets: the numbers there are, smallest first.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        engine: str | None = None,
        threads: int | None = None,
        only: int | None = None,
        opened: VisionEncoder | None = None,
        batch: int = 1,
    ) -> None:
        """Look what the bundle has; nothing is loaded yet.

        Args:
            bundle: from `open_bundle`.
            engine: what runs the graphs; left out, what the bundle's target says.
            threads: CPU threads; left out, one per physical core.
            only: the one budget to use; left out, all.
            opened: one that is loaded already; it stays the caller's to close.
            batch: images that are usually encoded at once; see `engines.open_session`.

        Raises:
            OptionError: the bundle has no graph with ``only`` tokens.
        """
        graphs = bundle.manifest.vision if only is None else (bundle.vision(only),)
        self.budgets = tuple(sorted({graph.reducer.tokens for graph in graphs}))
        self.bundle, self._engine, self._threads = bundle, engine, threads
        self._batch = batch
        self._own: dict[int, VisionEncoder] = {}
        self._given = {opened.graph.reducer.tokens: opened} if opened is not None else {}

    def encoder(self, tokens: int) -> VisionEncoder:
        """Return the encoder with that many visual tokens.

        Raises:
            OptionError: the bundle has no such graph.
            EngineError: the graph cannot be loaded.
        """
        known = self._given.get(tokens) or self._own.get(tokens)
        if known is None:
            known = VisionEncoder(
                self.bundle,
                engine=self._engine,
                threads=self._threads,
                tokens=tokens,
                batch=self._batch,
                beside=self._beside(tokens),
            )
            self._own[tokens] = known
        return known

    def _beside(self, tokens: int) -> VisionEncoder | None:
        """Return an encoder that is open and shares with another budget; best, the same file."""
        file = self.bundle.vision(tokens).file
        opened = [*self._given.values(), *self._own.values()]
        return min(opened, key=lambda one: one.graph.file != file, default=None)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what was loaded here; calling it again does nothing."""
        for encoder in reversed(self._own.values()):  # the first owns what the others share
            encoder.close()
