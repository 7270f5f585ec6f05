"""A bundle, ready to answer: its vision graph, its prompts and its language model together.

Enters: pictures and questions. Leaves: answers, with the time of every stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from runtime.backends import LanguageBackend
from runtime.backends.opening import open_backend
from runtime.context import Context
from runtime.generate import Finish, Generation, GenerationOptions
from runtime.grammar import GrammarTokens
from runtime.parts import Embeddings
from runtime.prompt import PromptWriter, Turn, interleave
from runtime.vision import VisionEncoder, VisualTokens

Pixels = NDArray[np.uint8]
Show = Callable[[str], None]
"""Called with each piece of an answer as it is written."""


@dataclass(frozen=True)
class Answer:
    """What the model said and what it cost.

    Attributes:
        text: the answer.
        token_ids: its tokens, without the stop token.
        finish: why it ended.
        prompt_tokens: positions of the prompt, visual tokens included.
        reused_tokens: how many of them were in the KV cache already.
        milliseconds: time by stage: `preprocess` and `encode` of the pictures that came with the
            question, `prefill`, `decode` and `total`.
        seen: those pictures, as the language model saw them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    reused_tokens: int
    milliseconds: dict[str, float]
    seen: tuple[VisualTokens, ...] = ()

    @property
    def visual_tokens(self) -> int:
        """How many visual tokens came with the question."""
        return sum(int(visual.valid[0]) for visual in self.seen)

    def with_seen(self, seen: Sequence[VisualTokens]) -> Answer:
        """Return the answer with the pictures that came with its question, and their time."""
        preprocess_ms = sum(visual.milliseconds["preprocess"] for visual in seen)
        encode_ms = sum(visual.milliseconds["vision"] for visual in seen)
        spent = {"preprocess": preprocess_ms, "encode": encode_ms, **self.milliseconds}
        spent["total"] += preprocess_ms + encode_ms
        return replace(self, milliseconds=spent, seen=tuple(seen))


class Model:
    """The three parts of a bundle, loaded; use it as a context manager.

    Attributes:
        bundle: what was opened.
        encoder: pictures to visual tokens.
        writer: conversations to parts.
        context: the language model and what its KV cache holds.
    """

    def __init__(
        self, bundle: Bundle, encoder: VisionEncoder, writer: PromptWriter, backend: LanguageBackend
    ) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self.writer = writer
        self.context = Context(backend)

    def ask(
        self,
        picture: Pixels,
        question: str,
        options: GenerationOptions | None = None,
        *,
        system: str | None = None,
        show: Show | None = None,
    ) -> Answer:
        """Answer one question about one picture.

        Text before the picture that the KV cache holds from an earlier question is not computed
        again, nor is the picture if it is the same.

        Args:
            picture: RGB, uint8[H, W, 3].
            question: what to ask.
            options: how the answer is written.
            system: instructions before the conversation; not every checkpoint takes them.
            show: called with each piece of the answer as it is written.

        Raises:
            OptionError: the chat template refuses the conversation.
            PictureError: not a picture the tower can take.
            BackendError: more positions than the context holds.
        """
        visual = self.encoder.encode([picture])
        turns = [Turn("system", system)] if system else []
        turns.append(Turn("user", question, images=1))
        return self.answer(turns, [visual.picture(0)], options, show).with_seen([visual])

    def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Embeddings],
        options: GenerationOptions | None = None,
        show: Show | None = None,
    ) -> Answer:
        """Write the next turn of a conversation; what the KV cache holds of it is not recomputed.

        Args:
            turns: the conversation, ending with a question.
            pictures: float32[N, D] of each picture in it.
            options: how the answer is written.
            show: called with each piece of the answer as it is written.

        Raises:
            OptionError: the chat template refuses the conversation.
            BackendError: more positions than the context holds.
        """
        started = time.perf_counter()
        generation = self.generate(turns, pictures, options or GenerationOptions())
        decoding = time.perf_counter()
        for piece in generation:
            if show is not None:
                show(piece)
        ended = time.perf_counter()
        return Answer(
            text=generation.text,
            token_ids=tuple(generation.token_ids),
            finish=generation.finish or "max_tokens",
            prompt_tokens=self.context.reused + self.context.computed,
            reused_tokens=self.context.reused,
            milliseconds={
                "prefill": (decoding - started) * 1e3,
                "decode": (ended - decoding) * 1e3,
                "total": (ended - started) * 1e3,
            },
        )

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Embeddings], options: GenerationOptions
    ) -> Generation:
        """Prefill a conversation and return its answer in the making.

        Args:
            turns: the conversation, ending with a question.
            pictures: float32[N, D] of each picture in it.
            options: how the answer is written.

        Raises:
            OptionError: the chat template refuses the conversation.
            BackendError: more positions than the context holds.
        """
        constraint = self._grammar_tokens.start(options.grammar) if options.grammar else None
        ids = self.writer.ids(turns)
        logits = self.context.prefill(interleave(ids, self.writer.image_token_id, pictures))
        return Generation(
            self.context,
            logits,
            self.writer.tokenizer,
            stop_token_ids=self.writer.stop_token_ids,
            options=options,
            prompt_ids=ids.tolist(),
            constraint=constraint,
        )

    @cached_property
    def _grammar_tokens(self) -> GrammarTokens:
        return GrammarTokens(self.writer.tokenizer, self.writer.stop_token_ids)

    def close(self) -> None:
        """Free everything; calling it again does nothing."""
        self.encoder.close()
        self.context.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_model(
    bundle: Bundle,
    *,
    backend: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    visual_tokens: int | None = None,
    context_length: int | None = None,
) -> Model:
    """Load everything that answering takes.

    Args:
        bundle: from `open_bundle`.
        backend: the language backend; left out, the bundle's first.
        engine: what runs the vision graph; left out, what the bundle's target says.
        threads: CPU threads of the vision graph and of the language model; left out, one per
            physical core.
        visual_tokens: which of the bundle's vision graphs; left out, the first.
        context_length: positions the KV cache holds; left out, all the model was trained for.

    Raises:
        FoveateError: a part that cannot be loaded, said in words.
    """
    writer = PromptWriter(bundle)
    encoder = VisionEncoder(bundle, engine=engine, threads=threads, tokens=visual_tokens)
    try:
        language = open_backend(bundle, backend, threads=threads, context_length=context_length)
    except BaseException:
        encoder.close()
        raise
    return Model(bundle, encoder, writer, language)
