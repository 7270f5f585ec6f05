"""Turn a conversation into token ids, with a place for each picture's visual tokens.

The chat template is the checkpoint's own. It is rendered as transformers renders it and tokenized
as a whole, so the ids are equal to those the model was trained on. `<image>` marks where the visual
tokens go; so it does for a clip, which the template writes as `<video>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from engines.bundle import Bundle
from engines.errors import BundleError, OptionError
from engines.manifest import Prompt
from runtime.language.parts import Picture, TokenIds
from runtime.language.tokenizer_file import open_tokenizer, without_panic

if TYPE_CHECKING:
    from runtime.language.chat_template import ChatTemplate

PictureT = TypeVar("PictureT", bound=Picture)
_BREAK = "\ue000"
"""A private-use character that marks where text must not be read across; never tokenized."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        text: what is said.
        images: how many pictures come before the text.
        clips: how many clips come after the pictures, each in one place; few checkpoints take any.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: int = 0
    clips: int = 0

    @property
    def places(self) -> int:
        """How many places for visual tokens come before the text."""
        return self.images + self.clips


class PromptWriter:
    """Writes conversations the way one checkpoint expects them.

    Attributes:
        tokenizer: the checkpoint's.
        image_token_id: the id that stands for one picture.
        stop_token_ids: ids that end an answer.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the tokenizer and the chat template of an opened bundle.

        Raises:
            BundleError: either cannot be read, or the tokenizer does not know the image token.
        """
        self._open(bundle.manifest.prompt, bundle.root / "bundle.json")

    @classmethod
    def from_prompt(cls, prompt: Prompt, source: Path) -> PromptWriter:
        """Write as a checkpoint that is not in a bundle yet.

        Args:
            prompt: how it turns a conversation into ids.
            source: the file that says so; the tokenizer lies beside it.

        Raises:
            BundleError: as for a bundle.
        """
        writer = cls.__new__(cls)
        writer._open(prompt, source)
        return writer

    def _open(self, prompt: Prompt, source: Path) -> None:
        self._prompt, self._source = prompt, source
        self.tokenizer = open_tokenizer(source.parent / self._prompt.tokenizer, BundleError)
        self.image_token_id = self._prompt.image_token_id
        self.stop_token_ids = self._prompt.stop_token_ids
        known = self.tokenizer.token_to_id(self._prompt.image_token)
        if known != self.image_token_id:
            raise BundleError(
                f"{self._source}: the image token {self._prompt.image_token!r} is said to have id "
                f"{self.image_token_id}, and {self._prompt.tokenizer} gives it {known}. Build the "
                "bundle again from one checkpoint."
            )
        self._video_token_id = self._id_of_clips()

    def _id_of_clips(self) -> int | None:
        """Return the id that the template gives a clip.

        Raises:
            BundleError: the tokenizer does not know it.
        """
        token = self._prompt.video_token
        if token is None:
            return None
        found: int | None = self.tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(
                f"{self._source}: a clip's place is {token!r}, which {self._prompt.tokenizer} does "
                "not know. Build the bundle again from one checkpoint."
            )
        return found

    def render(self, turns: Sequence[Turn], answer: bool = True) -> str:
        """Return the conversation as text, with the image token in the place of a clip as well.

        Args:
            turns: the conversation.
            answer: end with what makes the model answer.

        Raises:
            OptionError: the template refuses the conversation.
        """
        text = self._render(turns, answer)
        if self._prompt.video_token is not None:  # words that say so hold a break
            text = text.replace(self._prompt.video_token, self._prompt.image_token)
        return text.replace(_BREAK, "")

    def render_messages(self, messages: list[dict[str, Any]]) -> str:
        """Return messages as the chat template writes them, as a server that has it does.

        Raises:
            OptionError: the template refuses them.
        """
        return self._render_messages(messages, answer=True)

    def ids(self, turns: Sequence[Turn], answer: bool = True) -> TokenIds:
        """Return the conversation as token ids, int64[N]; an image token for each picture or clip.

        Control tokens that a person wrote (`</s>`, `<image>`) are read as plain text.

        Raises:
            OptionError: the template refuses the conversation, or loses a picture or a clip.
        """
        text = self._render(turns, answer)
        bos = self._prompt.bos_token
        special = not (bos and text.startswith(bos))
        ids: list[int] = []
        for piece in text.split(_BREAK):
            ids += self._encode(piece, special and not ids)
        ids = [self.image_token_id if one == self._video_token_id else one for one in ids]
        wanted, found = sum(turn.places for turn in turns), ids.count(self.image_token_id)
        if found != wanted:
            raise OptionError(
                f"The conversation has {wanted} pictures and its prompt has {found} places for "
                "them. The checkpoint's chat template puts pictures in user turns only; put them "
                "there."
            )
        return np.array(ids, np.int64)

    def _encode(self, text: str, special: bool) -> list[int]:
        return without_panic(
            lambda: self.tokenizer.encode(text, add_special_tokens=special).ids,
            lambda problem: BundleError(
                f"{self._source.parent / self._prompt.tokenizer} cannot split a text of "
                f"{len(text):,} characters ({problem}). Build the bundle again."
            ),
        )

    def parts(
        self, turns: Sequence[Turn], pictures: Sequence[PictureT], answer: bool = True
    ) -> list[TokenIds | PictureT]:
        """Return the conversation as parts: ids, and the visual tokens of each picture.

        Args:
            turns: the conversation.
            pictures: the visual tokens of each, in the order of the turns.
            answer: end with what makes the model answer.

        Raises:
            OptionError: the template refuses the conversation, or there are more or fewer pictures
                than the turns say.
        """
        return interleave(self.ids(turns, answer), self.image_token_id, pictures)

    def _render(self, turns: Sequence[Turn], answer: bool) -> str:
        return self._render_messages([self._message(turn) for turn in turns], answer)

    def _render_messages(self, messages: list[dict[str, Any]], answer: bool) -> str:
        special = {"bos_token": self._prompt.bos_token, "eos_token": self._prompt.eos_token}
        return self._template.render(
            messages=messages,
            add_generation_prompt=answer,
            **{name: token for name, token in special.items() if token is not None},
        )

    def _message(self, turn: Turn) -> dict[str, Any]:
        text = self._defused(turn.text)
        if turn.clips and self._prompt.video_token is None:
            raise OptionError(
                "The conversation has a clip, and the checkpoint's chat template has no place for "
                "one. Show its frames as pictures."
            )
        if self._takes_lists:
            pictures = [{"type": "image"}] * turn.images + [{"type": "video"}] * turn.clips
            return {"role": turn.role, "content": [*pictures, {"type": "text", "text": text}]}
        pictures_text = f"{self._prompt.image_token}\n" * turn.images
        return {"role": turn.role, "content": pictures_text + text}

    def _defused(self, text: str) -> str:
        """Break up control tokens in what a person wrote, so that they are read as text."""
        text = text.replace(_BREAK, "")
        return self._control_tokens.sub(lambda found: f"{found[0][:1]}{_BREAK}{found[0][1:]}", text)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        special = [
            token.content
            for token in self.tokenizer.get_added_tokens_decoder().values()
            if token.special
        ]
        special += [token for token in (self._prompt.video_token,) if token is not None]
        longest_first = sorted(special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _template(self) -> ChatTemplate:
        from runtime.language.chat_template import ChatTemplate

        return ChatTemplate(self._prompt.chat_template, str(self._source), BundleError)

    @cached_property
    def _takes_lists(self) -> bool:
        """Whether content is a list of images and texts; old templates take one string."""
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        try:
            return self._prompt.image_token in self._render_messages(probe, answer=True)
        except OptionError:
            return False


def interleave(
    ids: TokenIds, image_token_id: int, pictures: Sequence[PictureT]
) -> list[TokenIds | PictureT]:
    """Put each picture's visual tokens in the place of its image token.

    Raises:
        OptionError: there are more or fewer pictures than image tokens.
    """
    places = np.flatnonzero(ids == image_token_id)
    if len(places) != len(pictures):
        raise OptionError(
            f"The conversation has places for {len(places)} pictures, and {len(pictures)} were "
            "given. Give one for each."
        )
    parts: list[TokenIds | PictureT] = []
    start = 0
    for place, picture in zip(places.tolist(), pictures, strict=True):
        parts += [ids[start:place], picture]
        start = place + 1
    return [part for part in [*parts, ids[start:]] if len(part)]
