"""A bundle's vision graph and language model as the camera loop takes them.

They share no state that changes, so the loop runs each in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.language.generate import GenerationOptions
from runtime.model import Answer, Model
from runtime.vision import Pixels, VisionEncoder, VisualTokens

SHORT_TOKENS = 64
"""The longest answer about a frame where the user says none: the next frame waits for it."""


class FrameEncoder:
    """The vision graph; see `runtime.camera.parts.Encoder`."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder

    def encode(self, images: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode images, uint8[H, W, 3] each, as one batch; return the tokens of each.

        Raises:
            EngineError: the graph failed.
            PictureError: one is not an image the tower can take.
        """
        return self._encoder.encode(list(images)).split()


class FrameAnswerer:
    """The language model, asked about one frame after another; see `Model.answer_about`.

    Text before the image stays in the KV cache, and of the same image its tokens too.
    """

    def __init__(
        self, model: Model, options: GenerationOptions | None = None, system: str | None = None
    ) -> None:
        self._model = model
        said = model.bundle.manifest.prompt.max_new_tokens
        self._options = (options or GenerationOptions()).limited(said, SHORT_TOKENS, SHORT_TOKENS)
        self._system = system

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Answer:
        """Answer a question about one encoded image.

        Raises:
            OptionError: the chat template refuses the question.
            BackendError: the language model failed.
        """
        return self._model.answer_about(
            [visual],
            question,
            self._options,
            system=self._system,
            prefilled=prefilled,
            interrupted=interrupted,
        )
