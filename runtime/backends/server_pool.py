"""Ask several servers of one language model: when one dies, another one answers.

Robots keep the conversation and send all of it with each question, so any server can go on with it.
Each question goes to the server that has the fewest of ours, and to the next one if that one is
lost. Every few seconds all of them are asked whether they are there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.errors import BackendError
from engines.llm_words import SERVERS
from runtime.backends import TextBackend, TextGeneration
from runtime.backends.chat_server import ChatServer, ServerLostError, ServerOptions
from runtime.backends.opening import open_served_backend
from runtime.language.generate import Finish, GenerationOptions
from runtime.language.parts import Picture
from runtime.language.prompt import PromptWriter, Turn

CHECK_S = 2.0
"""Seconds between two looks at every server."""
_log = logging.getLogger(__name__)


@dataclass
class Rank:
    """One of the servers.

    Attributes:
        options: how to reach it.
        backend: None until it answered for the first time.
        up: whether it answered lately.
        asked: questions that it is answering.
    """

    options: ServerOptions
    backend: TextBackend | None = None
    up: bool = False
    asked: int = 0


class ServerPool:
    """Servers that hold the same language model; see `TextBackend`.

    Attributes:
        name: what kind of servers they are, ``"vllm"`` or ``"trtllm"``.
        ranks: in the order given.
        context_length: positions of prompt and answer together, the fewest of any server.
    """

    def __init__(
        self,
        bundle: Bundle,
        servers: Sequence[ServerOptions],
        writer: PromptWriter,
        name: str = SERVERS[0],
    ) -> None:
        """Look which servers are there.

        Raises:
            BackendError: none of them, or one that serves another model.
        """
        self._bundle, self._writer, self.name = bundle, writer, name
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.ranks = [Rank(options) for options in servers]
        problems = [str(error) for rank in self.ranks if (error := self._open(rank)) is not None]
        opened = [rank.backend for rank in self.ranks if rank.backend is not None]
        if not opened:
            raise BackendError(" ".join(problems))
        for problem in problems:
            _log.warning("A server of the language model is not there: %s", problem)
        self.context_length = min(backend.context_length for backend in opened)
        self._checking = threading.Thread(target=self._check, name="servers", daemon=True)
        self._checking.start()

    @property
    def up(self) -> int:
        """How many servers answered lately."""
        return sum(rank.up for rank in self.ranks)

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Picture], options: GenerationOptions
    ) -> PooledGeneration:
        """Start an answer on one of the servers; see `TextBackend.generate`."""
        return PooledGeneration(self, lambda backend: backend.generate(turns, pictures, options))

    def take(self, avoided: Sequence[Rank]) -> Rank | None:
        """Return the server to ask next, and count the question; None if all were tried."""
        with self._lock:
            left = [rank for rank in self.ranks if rank not in avoided and rank.backend is not None]
            chosen = min(left, key=lambda rank: (not rank.up, rank.asked), default=None)
            if chosen is not None:
                chosen.asked += 1
            return chosen

    def give_back(self, rank: Rank, lost: bool = False) -> None:
        """Take note that a server has ended an answer, or was lost."""
        with self._lock:
            rank.asked -= 1
            if lost:
                rank.up = False

    def close(self) -> None:
        """Let go of the servers; calling it again does nothing."""
        self._closed.set()

    def _open(self, rank: Rank) -> BackendError | None:
        try:
            rank.backend = open_served_backend(self.name, self._bundle, rank.options, self._writer)
        except ServerLostError as error:
            return error
        rank.up = True
        return None

    def _check(self) -> None:
        while not self._closed.wait(CHECK_S):
            for rank in self.ranks:
                up = self._answers(rank)
                if up != rank.up:
                    _log.warning("%s is %s", rank.options.url, "up" if up else "down")
                rank.up = up

    def _answers(self, rank: Rank) -> bool:
        try:
            if rank.backend is None:
                return self._open(rank) is None
            quick = ServerOptions(
                rank.options.url,
                rank.options.api_key,
                connect_seconds=CHECK_S,
                silence_seconds=CHECK_S,
                answer_seconds=2 * CHECK_S,
                attempts=1,
            )
            ChatServer(quick).models()
        except BackendError as error:
            _log.debug("%s", error)
            return False
        return True


class PooledGeneration:
    """One answer, by a server that may be exchanged while it is written; see `TextGeneration`.

    Attributes:
        text: the answer so far.
    """

    def __init__(self, pool: ServerPool, start: Callable[[TextBackend], TextGeneration]) -> None:
        self.text = ""
        self._pool, self._start = pool, start
        self._tried: list[Rank] = []
        self._rank: Rank | None = None
        self._current = self._next(None)

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer so far, without the stop token."""
        return self._current.token_ids

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None while it has not."""
        return self._current.finish

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt."""
        return self._current.prompt_tokens

    @property
    def reused_tokens(self) -> int | None:
        """How many of them the server had in its cache."""
        return self._current.reused_tokens

    def prefill(self) -> None:
        """Send the question, to the next server if one is lost, and wait for the first piece.

        Raises:
            BackendError: no server can answer.
        """
        while True:
            try:
                self._current.prefill()
            except ServerLostError as error:
                self._current = self._next(error)
            except BaseException:
                self._end()
                raise
            else:
                return

    def __iter__(self) -> Generator[str]:
        """Yield the answer's pieces; another server goes on where one was lost.

        Raises:
            BackendError: no server can answer, or the other one answers in other words.
        """
        try:
            while True:
                try:
                    self.prefill()
                    with closing(iter(self._current)) as pieces:
                        yield from self._new_part_of(pieces)
                except ServerLostError as error:
                    self._current = self._next(error)
                else:
                    return
        finally:
            self._end()

    def _new_part_of(self, pieces: Generator[str]) -> Generator[str]:
        """Leave out what an earlier server has said."""
        said, again = self.text, ""
        for piece in pieces:
            again += piece
            if not again.startswith(said[: len(again)]):
                raise self._diverged()
            new = again[len(self.text) :]
            if new:
                self.text += new
                yield new
        if len(again) < len(self.text):
            raise self._diverged()

    @staticmethod
    def _diverged() -> BackendError:
        return BackendError(
            "A server was lost in the middle of an answer, and the one asked instead answers in "
            "other words. Ask again."
        )

    def _next(self, lost: ServerLostError | None) -> TextGeneration:
        if self._rank is not None:
            self._tried.append(self._rank)
        self._end(lost=lost is not None)
        rank = self._pool.take(self._tried)
        if rank is None or rank.backend is None:
            raise lost or BackendError("No server of the language model is there.")
        if lost is not None:
            _log.warning("%s is asked instead: %s", rank.options.url, lost)
        self._rank = rank
        try:
            return self._start(rank.backend)
        except BaseException:
            self._end()
            raise

    def _end(self, lost: bool = False) -> None:
        if self._rank is not None:
            self._pool.give_back(self._rank, lost)
            self._rank = None
