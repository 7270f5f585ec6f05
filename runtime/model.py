"""A loaded bundle that answers questions about images: vision graph, prompts and language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.bundle import Bundle, open_bundle
from engines.errors import BackendError
from engines.llm_words import KvCache, LlmDevice, Positions, VisualWeights
from engines.memory.context_length import ContextNeed
from runtime.backends import TextBackend
from runtime.backends.chat_server import ServerOptions
from runtime.backends.context import Context
from runtime.backends.local_text import LocalText
from runtime.backends.opening import open_text_backend
from runtime.language.generate import Finish, GenerationOptions
from runtime.language.parts import Picture
from runtime.language.prompt import PromptWriter, Turn
from runtime.vision import Pixels, VisionEncoder, VisualTokens
from runtime.vision.pictures import load_picture
from runtime.vision.places import picture_of

Show = Callable[[str], None]
"""Called with each piece of an answer as it is written."""


@dataclass(frozen=True)
class Answer:
    """What the model said and what it cost.

    Attributes:
        text: the answer.
        token_ids: its tokens, without the stop token.
        finish: why it ended.
        backend: the language backend that wrote it.
        prompt_tokens: positions of the prompt, visual tokens included.
        reused_tokens: how many of them were in the KV cache already; None where a server does not
            say.
        milliseconds: time by stage: `preprocess` and `encode` of the images that came with the
            question, `prefill`, `decode` and `total`.
        seen: those images, as the language model saw them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    backend: str
    prompt_tokens: int
    reused_tokens: int | None
    milliseconds: dict[str, float]
    seen: tuple[VisualTokens, ...] = ()

    @property
    def computed_tokens(self) -> int | None:
        """How many positions of the prompt were not in the KV cache; None where it is unknown."""
        return None if self.reused_tokens is None else self.prompt_tokens - self.reused_tokens

    @property
    def visual_tokens(self) -> int:
        """How many visual tokens came with the question."""
        return sum(int(visual.valid[0]) for visual in self.seen)

    def with_seen(self, seen: Sequence[VisualTokens]) -> Answer:
        """Return the answer with the images that came with its question, and their time."""
        preprocess_ms = sum(visual.milliseconds["preprocess"] for visual in seen)
        encode_ms = sum(visual.milliseconds["encode"] for visual in seen)
        spent = {"preprocess": preprocess_ms, "encode": encode_ms, **self.milliseconds}
        spent["total"] += preprocess_ms + encode_ms
        return replace(self, milliseconds=spent, seen=tuple(seen))


class Model(AbstractContextManager["Model"]):
    """The three parts of a bundle, loaded; use it as a context manager.

    Attributes:
        bundle: what was opened.
        encoder: images to visual tokens.
        writer: conversations to parts.
        language: writes the answers.
        positions: where visual tokens stand for it.
        visual_weights: how much they count in its attention.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: VisionEncoder,
        writer: PromptWriter,
        language: TextBackend,
        positions: Positions = "compact",
        visual_weights: VisualWeights = "equal",
    ) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self.writer = writer
        self.language = language
        self.positions: Positions = positions
        self.visual_weights: VisualWeights = visual_weights

    def ask(
        self,
        image: Pixels | str | Path,
        question: str,
        options: GenerationOptions | None = None,
        *,
        system: str | None = None,
        show: Show | None = None,
    ) -> Answer:
        """Answer one question about one image.

        Text before the image that the KV cache holds from an earlier question is not computed
        again, nor is the image if it is the same.

        Args:
            image: RGB, uint8[H, W, 3]; or the name of a picture file.
            question: what to ask.
            options: how the answer is written.
            system: instructions before the conversation; not every checkpoint takes them.
            show: called with each piece of the answer as it is written.

        Raises:
            OptionError: the chat template refuses the conversation.
            PictureError: not an image the tower can take.
            BackendError: more positions than the context holds.
        """
        if isinstance(image, (str, Path)):
            image = load_picture(image)
        visual = self.encoder.encode([image])
        return self.answer_about([visual], question, options, system=system, show=show)

    def answer_about(
        self,
        visuals: Sequence[VisualTokens],
        question: str,
        options: GenerationOptions | None = None,
        *,
        system: str | None = None,
        show: Show | None = None,
        prefilled: Callable[[], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer one question about images that are encoded.

        Args:
            visuals: the tokens of each image, a batch of one each, in the order of the prompt.
            question: what to ask.
            options: how the answer is written.
            system: instructions before the conversation.
            show: as in `answer`, like the two that follow.
            prefilled: called once the prompt was read.
            interrupted: asked after each piece; true ends the answer early.

        Raises:
            OptionError: the chat template refuses the conversation.
            BackendError: the language model failed, or more positions than the context holds.
        """
        turns = [Turn("system", system)] if system else []
        turns.append(Turn("user", question, images=len(visuals)))
        answer = self.answer(
            turns,
            [self.picture_of(visual) for visual in visuals],
            options,
            show,
            prefilled=prefilled,
            interrupted=interrupted,
        )
        return answer.with_seen(visuals)

    def answer(
        self,
        turns: Sequence[Turn],
        images: Sequence[Picture],
        options: GenerationOptions | None = None,
        show: Show | None = None,
        *,
        prefilled: Callable[[], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Answer:
        """Write the next turn of a conversation; what the KV cache holds of it is not recomputed.

        Args:
            turns: the conversation, ending with a question.
            images: the visual tokens of each image in it, as `picture_of` returns them.
            options: how the answer is written.
            show: called with each piece of the answer as it is written.
            prefilled: called once the prompt was read.
            interrupted: asked after each piece; true ends the answer early.

        Raises:
            OptionError: the chat template refuses the conversation.
            BackendError: the language model failed, or more positions than the context holds.
        """
        started = time.perf_counter()
        generation = self.language.generate(turns, images, self.limited(options))
        generation.prefill()
        decoding = time.perf_counter()
        if prefilled is not None:
            prefilled()
        with closing(iter(generation)) as pieces:  # leaving early cancels a server's answer
            for piece in pieces:
                if show is not None:
                    show(piece)
                if interrupted is not None and interrupted():
                    break
        ended = time.perf_counter()
        return Answer(
            text=generation.text,
            token_ids=tuple(generation.token_ids),
            finish=generation.finish or "interrupted",
            backend=self.language.name,
            prompt_tokens=generation.prompt_tokens,
            reused_tokens=generation.reused_tokens,
            milliseconds={
                "prefill": (decoding - started) * 1e3,
                "decode": (ended - decoding) * 1e3,
                "total": (ended - started) * 1e3,
            },
        )

    def picture_of(self, visual: VisualTokens) -> Picture:
        """Return an image's visual tokens as a prompt takes them.

        Args:
            visual: a batch of one.
        """
        columns = self.encoder.graph.patch_columns
        return picture_of(visual, self.positions, self.visual_weights, columns)

    def warm_up(self, batch: int = 1) -> float:
        """Answer once about a black picture, so that the first real answer is as fast as the next.

        Kernels are loaded, weights are read from the disk, buffers and CUDA graphs are made.

        Args:
            batch: images that are usually encoded at once.

        Returns:
            Seconds it took.

        Raises:
            FoveateError: what a first answer would raise.
        """
        started = time.perf_counter()
        size = self.encoder.frame_size or self.bundle.manifest.preprocessing
        black = np.zeros((size.height, size.width, 3), np.uint8)
        if batch > 1:
            self.encoder.encode([black] * batch)
        options = GenerationOptions(max_tokens=2)
        self.answer_about([self.encoder.encode([black])], "What is ahead?", options)
        return time.perf_counter() - started

    def limited(self, options: GenerationOptions | None) -> GenerationOptions:
        """Return how an answer is written, its longest length filled in from the checkpoint."""
        said = self.bundle.manifest.prompt.max_new_tokens
        return (options or GenerationOptions()).limited(said)

    @property
    def context(self) -> Context:
        """The language model and what its KV cache holds.

        Raises:
            BackendError: a server runs it.
        """
        if isinstance(self.language, LocalText):
            return self.language.context
        raise BackendError(
            f'The backend "{self.language.name}" runs on a server, which gives text and no logits. '
            "Open the model with ort, llamacpp or openvino for this."
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; calling it again does nothing."""
        self.encoder.close()
        self.language.close()


def open_model(
    bundle: Bundle | str | Path,
    *,
    backend: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    visual_tokens: int | None = None,
    context_length: int | None = None,
    need: ContextNeed = ContextNeed(),
    kv_cache: KvCache = "f16",
    positions: Positions = "compact",
    visual_weights: VisualWeights = "equal",
    device: LlmDevice | None = None,
    server: ServerOptions | None = None,
    batch: int = 1,
) -> Model:
    """Load everything that answering takes.

    Args:
        bundle: from `open_bundle`, or its directory.
        backend: the language backend; left out, the bundle's first.
        engine: what runs the vision graph; left out, what the bundle's target says.
        threads: CPU threads of the vision graph and of the language model; left out, one per
            physical core.
        visual_tokens: which of the bundle's vision graphs; left out, the first.
        context_length: positions the KV cache holds; left out, what ``need`` asks for.
        need: what the KV cache has to hold; left out, four questions about a picture.
        kv_cache: how llama.cpp keeps keys and values: ``"f16"`` or ``"q8"``.
        positions: ``"compact"``, visual tokens stand one after the other; or ``"original"``, where
            each would if none had been dropped.
        visual_weights: ``"equal"``, each counts as one in attention; or ``"patches"``, as many as
            were merged in it.
        device: where ONNX Runtime computes the language model; left out, where it was built for.
        server: where the language model is, if a server runs it.
        batch: images that are usually encoded at once; see `engines.open_session`.

    Raises:
        FoveateError: a part that cannot be loaded, said in words.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    writer = PromptWriter(bundle)
    # Side by side: each is loaded by one core, and a 7B's language model takes seconds.
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(
            VisionEncoder, bundle, engine=engine, threads=threads, tokens=visual_tokens, batch=batch
        )
        try:
            language = open_text_backend(
                writer,
                bundle,
                backend,
                threads=threads,
                context_length=context_length,
                need=need,
                kv_cache=kv_cache,
                positions=positions,
                visual_weights=visual_weights,
                device=device,
                server=server,
            )
        except BaseException:
            loading.result().close()  # where both fail, the graph's reason is told
            raise
    try:
        encoder = loading.result()
    except BaseException:
        language.close()
        raise
    return Model(bundle, encoder, writer, language, positions, visual_weights)
