"""Choose how many positions the KV cache of a bundle's decoder holds."""

from __future__ import annotations

from dataclasses import replace

from engines.bundle import Bundle
from engines.errors import BackendError
from engines.memory.context_length import ContextNeed
from runtime.language.generate import GenerationOptions


def choose_context_length(bundle: Bundle, given: int | None, need: ContextNeed) -> int:
    """Return the length that was given, or else what the questions need.

    Args:
        bundle: its largest budget of visual tokens counts.
        given: positions, by the user.
        need: what the cache has to hold where none is given.

    Raises:
        BackendError: a length the model was not trained for.
    """
    trained = bundle.manifest.text.context_length
    if given is None:
        if need.answer_tokens is None:
            limit = GenerationOptions().limited(bundle.manifest.prompt.max_new_tokens).most_tokens
            need = replace(need, answer_tokens=limit)
        largest = bundle.largest_vision()
        patches = bundle.most_squares * largest.patch_rows * largest.patch_columns
        tokens = bundle.most_visual_tokens(largest)
        return need.with_visual_tokens(tokens, patches).positions(trained)
    if not 1 <= given <= trained:
        raise BackendError(
            f"context_length is {given}: expected 1 to {trained}, the positions the language model "
            "was trained for."
        )
    return given
