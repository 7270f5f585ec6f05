"""Write a conversation as messages for a chat server, and check that it renders our prompt.

vLLM puts a placeholder text in the place of each picture, so what a template writes around a
picture (LLaVA's writes a line break after it) is sent as text. The messages are rendered here as
the server will render them, and compared with our own prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from engines.errors import OptionError
from engines.manifest import Prompt
from runtime.language.prompt import PromptWriter, Turn

_PLACEHOLDER = "<prompt_embeds>"
"""What vLLM puts in the place of a picture; it refuses words that contain it."""
_WORDS = "\ue001"
"""A private-use character that stands for a turn's words while the template is looked at."""


class ServedPrompt:
    """Writes the messages for a server that has the bundle's chat template and tokenizer."""

    def __init__(self, writer: PromptWriter, prompt: Prompt) -> None:
        self._writer = writer
        self._image_token = prompt.image_token
        self._bos_token = prompt.bos_token
        self._control_tokens = (*control_tokens(writer), _PLACEHOLDER)

    def messages(self, turns: Sequence[Turn], payloads: Sequence[str]) -> list[dict[str, Any]]:
        """Return the conversation, with a payload in the place of each picture.

        Raises:
            OptionError: words that the server would take for control tokens, or a chat template
                that it would render differently.
        """
        waiting = iter(payloads)
        sent, rendered = [], []
        for turn in turns:
            refuse_control_tokens(turn.text, self._control_tokens)
            parts = list(self._parts(turn))
            sent.append({"role": turn.role, "content": [_part(part, waiting) for part in parts]})
            texts = [self._image_token if part is None else part for part in parts]
            content = [{"type": "text", "text": text} for text in texts]
            rendered.append({"role": turn.role, "content": content})
        if self._writer.render_messages(rendered) != self._writer.render(turns):
            raise OptionError(
                "The bundle's chat template cannot be used on a server: given a picture as text it "
                "writes another prompt than given a picture. It must write the parts of a message "
                "in order, as LLaVA's templates do; answer here with --backend ort."
            )
        return sent

    def adds_special_tokens(self, turns: Sequence[Turn]) -> bool:
        """Return whether the tokenizer has to add what the template does not begin with."""
        bos = self._bos_token
        return not (bos and self._writer.render(turns).startswith(bos))

    def _parts(self, turn: Turn) -> Iterator[str | None]:
        """Yield a message's texts in order, and None for each picture."""
        if not turn.places:
            yield turn.text
            return
        probe = self._writer.render([Turn(turn.role, _WORDS, turn.images, turn.clips)])
        marks = f"{re.escape(self._image_token)}|{_WORDS}"
        places = list(re.finditer(marks, probe))
        written = probe[places[0].start() : places[-1].end()]
        for piece in re.split(f"({re.escape(self._image_token)})", written):
            if piece != self._image_token:
                text = piece.replace(_WORDS, turn.text)
                if text:
                    yield text
            else:
                yield None


def control_tokens(writer: PromptWriter) -> tuple[str, ...]:
    """Return the tokenizer's special tokens as text, which a server would obey."""
    added = writer.tokenizer.get_added_tokens_decoder().values()
    return tuple(token.content for token in added if token.special)


def refuse_control_tokens(text: str, tokens: Sequence[str]) -> None:
    """Refuse words that a server would take for control tokens.

    Raises:
        OptionError: the words hold one.
    """
    found = [token for token in tokens if token in text]
    if found:
        raise OptionError(
            f"The text holds {', '.join(map(repr, found))}, which a server would obey as a "
            "control token instead of reading it. Take it out, or answer here with "
            "--backend ort, which reads it as text."
        )


def _part(part: str | None, payloads: Iterator[str]) -> dict[str, str]:
    if part is None:
        return {"type": "prompt_embeds", "data": next(payloads)}
    return {"type": "text", "text": part}
