"""A bundle behind the two doors of the camera loop: one encodes frames, one answers about them.

They share nothing that changes, so the loop may run each in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing

from runtime.camera.parts import Said
from runtime.frames import Picture
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import Model
from runtime.vision import VisionEncoder, VisualTokens


class FrameEncoder:
    """The vision graph, for one camera or several."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder

    def encode(self, image: Picture) -> VisualTokens:
        """Encode one picture.

        Raises:
            EngineError: the graph failed.
            PictureError: not a picture the tower can take.
        """
        return self._encoder.encode([image])

    def encode_batch(self, images: Sequence[Picture]) -> list[VisualTokens]:
        """Encode pictures of any sizes as one batch.

        Raises:
            EngineError: the graph failed.
            PictureError: one is not a picture the tower can take.
        """
        return self._encoder.encode(list(images)).split()


class FrameAnswerer:
    """The language model, asked about one frame after another.

    Text before the picture stays in the KV cache, and of the same picture its tokens too.
    """

    def __init__(
        self, model: Model, options: GenerationOptions | None = None, system: str | None = None
    ) -> None:
        self._model = model
        self._options = options or GenerationOptions(max_tokens=64)
        self._turns = [Turn("system", system)] if system else []

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Said:
        """Answer a question about one encoded picture.

        Raises:
            OptionError: the chat template refuses the question.
            BackendError: the language model failed.
        """
        started_s = time.perf_counter()
        turns = [*self._turns, Turn("user", question, images=1)]
        generation = self._model.language.generate(turns, [visual.picture(0)], self._options)
        generation.prefill()
        decoding_s = time.perf_counter()
        prefilled()
        with closing(iter(generation)) as pieces:
            for _ in pieces:
                if interrupted():
                    break
        return Said(
            text=generation.text,
            token_ids=tuple(generation.token_ids),
            finish=generation.finish or "interrupted",
            prompt_tokens=generation.prompt_tokens,
            prefill_ms=(decoding_s - started_s) * 1e3,
            decode_ms=(time.perf_counter() - decoding_s) * 1e3,
        )
