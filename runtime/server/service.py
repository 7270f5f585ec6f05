"""The parts of a server together: pictures in, answers out, within the limits of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.llm_words import SERVERS
from engines.memory.vision import runs_on_gpu
from engines.opening import target_of
from engines.version import __version__
from runtime.backends import TextBackend
from runtime.backends.local_text import LocalText
from runtime.backends.opening import open_text_backend, require_plain_tokens
from runtime.backends.server_pool import ServerPool
from runtime.language.prompt import PromptWriter
from runtime.server.answering import AnsweringThreads, Item
from runtime.server.caches import Caches
from runtime.server.chat_request import Question
from runtime.server.counters import Counters
from runtime.server.encoding import EncodingThread, Remembered
from runtime.server.options import Limits, Listening, ServedParts
from runtime.server.picture_sources import PictureSources, check_allowed
from runtime.server.refusals import RefusalError
from runtime.server.seen_picture import SeenPicture
from runtime.server.ticket import Ticket
from runtime.vision import Pixels
from runtime.vision.graph_pool import GraphPool
from runtime.vision.pictures import picture_from_bytes
from runtime.vision.places import picture_of
from runtime.vision.visual_tokens import Shown

_DECODERS = 2
"""Pictures decoded at once: a large one takes half a gigabyte for a moment."""
_MOST_CHARACTERS_PER_TOKEN = 32


class Service:
    """A bundle that is served.

    Attributes:
        bundle: what is served.
        name: what clients call it.
        budgets: visual tokens that a request may choose, the default first.
        limits: of requests.
        counters: for `/metrics`.
        created: seconds since 1970 when it was opened.
    """

    def __init__(
        self, bundle: Bundle, parts: ServedParts, listening: Listening, limits: Limits
    ) -> None:
        """Load the parts of a bundle.

        Raises:
            FoveateError: a part that cannot be loaded, said in words.
        """
        self.bundle, self.parts, self.limits = bundle, parts, limits
        self.name = parts.name or bundle.manifest.model
        self.created = int(time.time())
        self.budgets = _budgets(bundle, parts)
        self.sources = PictureSources(check_allowed(listening.allow_urls), limits.max_body_bytes)
        self.counters = Counters()
        batch = limits.batch or (8 if _on_gpu(bundle, parts) else 1)
        self._graphs = GraphPool(bundle, engine=parts.engine, threads=parts.threads, batch=batch)
        for tokens in self.budgets:
            self._graphs.encoder(tokens)
        self._encoding = EncodingThread(self._graphs, batch, self.counters.observe_batch)
        self.remembered = Remembered(limits.remembered_bytes)
        self._decoding = ThreadPoolExecutor(_DECODERS, "decoding")
        # Decoded pictures that wait for the graph: each may have 75 MB.
        self._decoded = asyncio.Semaphore(2 * batch + _DECODERS)
        self.writer = PromptWriter(bundle)
        self.context_length, self.backend = bundle.manifest.text.context_length, "none"
        self._pool: ServerPool | None = None
        self.answering = self._open_answering()

    def _open_answering(self) -> AnsweringThreads | None:
        """Load the language model, unless this server only encodes."""
        language = _open_language(self.bundle, self.parts, self.writer, self.limits.deadline_s)
        if language is None:
            return None
        self._pool = language if isinstance(language, ServerPool) else None
        self.context_length, self.backend = language.context_length, language.name
        parallel = self.limits.parallel or _usual_parallel(language)
        if parallel > 1 and not _apart(language):
            raise OptionError("--parallel: llama.cpp writes one answer at a time. Leave it out.")
        caches = Caches(language, self.writer, max(self.limits.conversations, parallel))
        encoder = self._graphs.encoder(self.budgets[0])
        return AnsweringThreads(self.bundle, encoder, self.writer, caches, parallel)

    @property
    def problem(self) -> str | None:
        """What keeps it from answering now, if anything does."""
        if not self._encoding.alive:
            return "the vision graph's thread has ended: start the server again"
        if self._pool is not None and not self._pool.up:
            return "no server of the language model answers"
        return None

    def metadata(self) -> dict[str, Any]:
        """Return what a client may want to know of the bundle, as JSON."""
        manifest = self.bundle.manifest
        graphs = [self.bundle.vision(tokens) for tokens in self.budgets]
        return {
            "model": self.name,
            "checkpoint": manifest.model,
            "role": self.parts.role,
            "target": manifest.target,
            "backend": self.backend,
            "servers": {rank.options.url: rank.up for rank in self._pool.ranks}
            if self._pool is not None
            else {},
            "context_length": self.context_length,
            "hidden_size": manifest.text.hidden_size,
            "embeddings": manifest.files[manifest.text.embeddings].sha256,
            "budgets": [
                {
                    "visual_tokens": graph.reducer.tokens,
                    "reducer": graph.reducer.name,
                    "precision": graph.precision,
                    "patch_rows": graph.patch_rows,
                    "patch_columns": graph.patch_columns,
                    "accuracy": graph.accuracy,
                }
                for graph in graphs
            ],
            "limits": {
                "queue": self.limits.queue,
                "deadline_s": self.limits.deadline_s,
                "max_body_bytes": self.limits.max_body_bytes,
                "max_pixels": self.limits.max_pixels,
                "max_pictures": self.limits.max_pictures,
                "max_tokens": self.limits.max_tokens,
            },
            "versions": {"foveate": __version__, "bundle": manifest.versions},
        }

    def budget(self, asked: int | None) -> int:
        """Return the visual tokens of each picture.

        Raises:
            RefusalError: the bundle has no such budget.
        """
        if asked is None:
            return self.budgets[0]
        if asked not in self.budgets:
            raise RefusalError(
                400,
                f"visual_tokens is {asked}, expected one of "
                f"{', '.join(map(str, sorted(self.budgets)))}: a graph was built for each.",
                "unknown_budget",
                "visual_tokens",
            )
        return asked

    async def look(
        self,
        data: bytes,
        tokens: int,
        ticket: Ticket,
        fresh: bool = False,
        among_others: bool = False,
    ) -> SeenPicture:
        """Return what the tower sees in a picture.

        Args:
            data: the picture file.
            tokens: the budget.
            ticket: of the request.
            fresh: encode it even if it is remembered.
            among_others: the conversation has other pictures.

        Raises:
            PictureError: it cannot be read.
            EngineError: the graph failed.
        """
        loop = asyncio.get_running_loop()
        digest = await loop.run_in_executor(self._decoding, _digest, data)
        differs = among_others and self.bundle.squares_of_several
        shown: Shown = "among_others" if differs else "alone"
        known = None if fresh else self.remembered.find((digest, tokens, shown))
        self.counters.observe_picture(known is not None)
        if known is not None:
            return known
        came = time.perf_counter()
        async with self._decoded:
            started = time.perf_counter()
            pixels = await loop.run_in_executor(self._decoding, self._decode, data)
            read_ms = (time.perf_counter() - started) * 1e3
            encoding = self._encoding.encode(pixels, tokens, ticket, shown)
            visual = await asyncio.wrap_future(encoding)
        height, width, _ = pixels.shape
        spent_ms = {"read": read_ms, **visual.milliseconds}
        whole_ms = (time.perf_counter() - came) * 1e3
        spent_ms["queue"] = max(whole_ms - sum(spent_ms.values()), 0.0)
        seen = SeenPicture(visual, width, height, spent_ms)
        self.remembered.keep((digest, tokens, shown), seen)
        return seen

    def _decode(self, data: bytes) -> Pixels:
        return picture_from_bytes(data, most_pixels=self.limits.max_pixels)

    async def see(self, question: Question, ticket: Ticket) -> list[SeenPicture]:
        """Return what the tower sees in a question's pictures.

        Raises:
            RefusalError: too many, too large, or not to be had.
            FoveateError: as `look`.
        """
        if self.answering is None:
            raise _only_encodes()
        tokens = self.budget(question.visual_tokens)
        self._refuse_too_much(question)
        loop = asyncio.get_running_loop()
        urls = question.picture_urls
        files = [await loop.run_in_executor(None, self.sources.read, url) for url in urls]
        looks = [
            asyncio.ensure_future(
                self.look(data, tokens, ticket, question.fresh, among_others=len(files) > 1)
            )
            for data in files
        ]
        try:
            return list(await asyncio.gather(*looks))
        finally:
            for look in looks:
                look.cancel()

    def _refuse_too_much(self, question: Question) -> None:
        """Refuse what cannot be answered before work is done for it."""
        pictures = len(question.picture_urls)
        if pictures > self.limits.max_pictures:
            raise RefusalError(
                400,
                f"There are {pictures} pictures, expected at most {self.limits.max_pictures}. Send "
                "fewer, or start the server with a larger --max-pictures.",
                "too_many_pictures",
                "messages",
            )
        words = sum(len(turn.text) for turn in question.turns)
        most_words = _MOST_CHARACTERS_PER_TOKEN * self.context_length
        # A picture's real tokens may be fewer than its budget: what is left is counted later.
        if words > most_words or pictures > self.context_length:
            raise self._too_long(f"{words:,} characters and {pictures} pictures")

    def _too_long(self, got: str) -> RefusalError:
        return RefusalError(
            400,
            f"The conversation has {got}, and the language model's context holds "
            f"{self.context_length:,} tokens. Shorten it, send fewer pictures or ask for fewer "
            "visual_tokens.",
            "context_length_exceeded",
            "messages",
        )

    async def write(
        self, question: Question, pictures: Sequence[SeenPicture], ticket: Ticket
    ) -> AsyncIterator[Item]:
        """Yield what `AnsweringThreads.answer` does.

        Raises:
            RefusalError: the conversation is too long, or as there.
            OptionError: the chat template refuses it.
        """
        if self.answering is None:
            raise _only_encodes()
        visual = sum(picture.count for picture in pictures)
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(None, self.writer.ids, question.turns)
        positions = len(ids) - len(pictures) + visual
        if positions >= self.context_length:
            raise self._too_long(f"{positions:,} tokens, {visual:,} of them visual,")
        columns = self.bundle.vision().patch_columns
        asked = self.parts.positions, self.parts.visual_weights
        tokens = [picture_of(seen.visual, *asked, columns) for seen in pictures]
        async for item in self.answering.answer(
            question.turns, tokens, question.generation, ticket, question.fresh
        ):
            yield item

    def close(self) -> None:
        """Free everything."""
        self._encoding.close()
        self._decoding.shutdown(cancel_futures=True)
        if self.answering is not None:
            self.answering.close()
        self._graphs.close()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _only_encodes() -> RefusalError:
    return RefusalError(
        404,
        "This server encodes pictures (POST /encode) and has no language model. Start it with "
        "--llm-url, or without --role encoder.",
        "no_language_model",
    )


def _budgets(bundle: Bundle, parts: ServedParts) -> tuple[int, ...]:
    if parts.visual_tokens:
        return tuple(dict.fromkeys(bundle.vision(n).reducer.tokens for n in parts.visual_tokens))
    return tuple(dict.fromkeys(graph.reducer.tokens for graph in bundle.manifest.vision))


def _on_gpu(bundle: Bundle, parts: ServedParts) -> bool:
    return runs_on_gpu(parts.engine or target_of(bundle).engine)


def _apart(language: TextBackend) -> bool:
    """Return whether several answers can be written at once."""
    return not isinstance(language, LocalText) or language.context.backend.capabilities.apart


def _usual_parallel(language: TextBackend) -> int:
    """Return how many are, unless it is said."""
    if isinstance(language, LocalText):
        return 2 if _apart(language) else 1
    return 32


def _open_language(
    bundle: Bundle, parts: ServedParts, writer: PromptWriter, deadline_s: float
) -> TextBackend | None:
    servers = parts.servers(deadline_s)
    if servers:
        require_plain_tokens(parts.positions, parts.visual_weights)
        if parts.backend not in (None, *SERVERS) or parts.context_length is not None:
            raise OptionError(
                "--llm-url names servers of the language model, and --backend or --context-length "
                "one of this process. Leave one of them out."
            )
        return ServerPool(bundle, servers, writer, parts.backend or SERVERS[0])
    if parts.role == "encoder":
        return None
    return open_text_backend(
        writer,
        bundle,
        parts.backend,
        threads=parts.threads,
        context_length=parts.context_length,
        positions=parts.positions,
        visual_weights=parts.visual_weights,
    )
