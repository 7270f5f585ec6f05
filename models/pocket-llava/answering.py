"""Answers to packed questions, from visual tokens, in one pass.

Tower features and packed questions enter; logits, or which answers are right, leave. An answer is
right when every token of it, the end included, is the most likely one given the right tokens
before it: exactly when greedy decoding gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from packing import IGNORED, PackedText, block_mask, encode_prefix
from torch import Tensor
from transformers import LlavaForConditionalGeneration


def answer_logits(
    model: LlavaForConditionalGeneration,
    tokens: Tensor,
    text: PackedText,
    gap: int = 0,
    with_system_prompt: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run projector and language model.

    Args:
        model: the whole model; its tower is not used.
        tokens: float32[B, N, D] tower features after any reducer.
        text: the questions about each picture.
        gap: positions left out between picture and text.
        with_system_prompt: put the system prompt in front.

    Returns:
        logits: float32[A, V] at the answers' tokens, and their targets int64[A].
    """
    visual = model.model.multi_modal_projector(tokens)
    return read_visual(model, visual, text, gap, with_system_prompt)


def read_visual(
    model: Any, visual: Tensor, text: PackedText, gap: int = 0, with_system_prompt: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the language model alone, on visual tokens float32[B, N, D]; see `answer_logits`."""
    llm = model.model.language_model
    embed = llm.get_input_embeddings()
    prefix = torch.tensor(encode_prefix(with_system_prompt))
    batch, before = len(visual), len(prefix) + visual.shape[1]
    inputs = torch.cat(
        [embed(prefix).expand(batch, -1, -1), visual.to(torch.float32), embed(text.ids)], 1
    )
    positions = torch.cat(
        [torch.arange(before).expand(batch, -1), before + gap + text.positions], 1
    )
    mask = block_mask(text.blocks, before)
    if torch.is_autocast_enabled("cpu"):
        mask = mask.to(torch.bfloat16)
    output = llm(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden = output.last_hidden_state[:, before:]
    wanted = text.targets != IGNORED
    return model.lm_head(hidden[wanted]).float(), text.targets[wanted]


@torch.no_grad()
def right_answers(model: LlavaForConditionalGeneration, tokens: Tensor, text: PackedText) -> Tensor:
    """Return bool[number of questions asked], which of them are answered exactly."""
    return whole_answers(*answer_logits(model, tokens, text), text)


def whole_answers(logits: Tensor, targets: Tensor, text: PackedText) -> Tensor:
    """Return bool[number of questions asked], from what `read_visual` returned."""
    question = text.questions[text.targets != IGNORED]
    wrong = torch.zeros(len(text.asked), dtype=torch.int64)
    wrong.index_add_(0, question, (logits.argmax(-1) != targets).long())
    return wrong == 0
