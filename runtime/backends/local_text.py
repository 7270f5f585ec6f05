"""Let a language model of this process take conversations and write text, like a server does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from runtime.backends import LanguageBackend
from runtime.backends.context import Context
from runtime.language.answer_form import require_usable
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.grammar import GrammarTokens
from runtime.language.parts import Picture
from runtime.language.prompt import PromptWriter, Turn, interleave


class LocalText:
    """A backend that gives logits, as one that gives text; see `TextBackend`.

    Attributes:
        name: the backend's.
        context_length: positions of prompt and answer together.
        context: the backend and what its KV cache holds.
    """

    def __init__(self, backend: LanguageBackend, writer: PromptWriter) -> None:
        self.name = backend.name
        self.context_length = backend.context_length
        self.context = Context(backend)
        self._writer = writer

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Picture], options: GenerationOptions
    ) -> Generation:
        """Prefill a conversation and return its answer in the making.

        Args:
            turns: the conversation, ending with a question.
            pictures: the visual tokens of each, in the order of the turns.
            options: how the answer is written.

        Raises:
            OptionError: the chat template refuses the conversation, or the form of the answer
                cannot be used.
            BackendError: more positions than the context holds.
        """
        constraint = None
        if options.grammar is not None:
            require_usable(options.grammar)
            constraint = self._grammar_tokens.start(options.grammar)
        ids = self._writer.ids(turns)
        logits = self.context.prefill(interleave(ids, self._writer.image_token_id, pictures))
        return Generation(
            self.context,
            logits,
            self._writer.tokenizer,
            stop_token_ids=self._writer.stop_token_ids,
            options=options,
            prompt_ids=ids.tolist(),
            prompt_tokens=self.context.reused + self.context.computed,
            reused_tokens=self.context.reused,
            constraint=constraint,
        )

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        self.context.backend.close()

    @cached_property
    def _grammar_tokens(self) -> GrammarTokens:
        return GrammarTokens(self._writer.tokenizer, self._writer.stop_token_ids)
