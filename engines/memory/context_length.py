"""How many positions a KV cache needs, for the question that is going to be asked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

PROMPT_TOKENS = 128
"""What a chat template and a question of 40 words take."""
ANSWER_TOKENS = 256
"""What `--max-tokens` is by default."""
EXCHANGES = 4
"""Questions with their answers that a conversation keeps by default."""
_WORDS_OF_A_FRAME = 32
_ROUND = 256
"""llama.cpp rounds its cache up to this."""


@dataclass(frozen=True)
class ContextNeed:
    """What a KV cache has to hold.

    Attributes:
        visual_tokens: of all pictures of one question; None is the bundle's largest budget.
        prompt_tokens: text before the answer.
        answer_tokens: most tokens of an answer; None is what the bundle says, or 256.
        exchanges: questions with their pictures and answers that are kept.
        clip_frames: pictures of a clip, each with a few words; together they cost as many visual
            tokens as one picture has patches, unless ``visual_tokens`` says otherwise.
    """

    visual_tokens: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int | None = None
    exchanges: int = EXCHANGES
    clip_frames: int = 0

    def with_text(self, *texts: str | None) -> ContextNeed:
        """Return the need with room for texts, each byte of which is a token at most."""
        size = sum(len(text.encode("utf-8", "replace")) for text in texts if text)
        return dataclasses.replace(self, prompt_tokens=self.prompt_tokens + size)

    def with_visual_tokens(self, largest_budget: int, patches: int) -> ContextNeed:
        """Return the need with a bundle's visual tokens filled in where none were given."""
        if self.visual_tokens is not None:
            return self
        chosen = max(largest_budget, patches) if self.clip_frames else largest_budget
        return dataclasses.replace(self, visual_tokens=chosen)

    def positions(self, trained: int) -> int:
        """Return the positions of the cache: all exchanges, rounded up to 256.

        Args:
            trained: positions the model was trained for, which is the most.
        """
        text = self.prompt_tokens + self.clip_frames * _WORDS_OF_A_FRAME
        one = (self.visual_tokens or 0) + text + (self.answer_tokens or ANSWER_TOKENS)
        return min(round_up(one * self.exchanges), trained)


def round_up(positions: int) -> int:
    """Return positions as llama.cpp allocates them."""
    return -(-positions // _ROUND) * _ROUND
