"""The trainable model: the projector and, on request, LoRA adapters in the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.errors import OptionError
from export.checkpoint.llava import Checkpoint
from export.tune.features import ReducedPictures
from export.tune.training_text import IGNORED, Row

TrainingPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer of the language model but its head.

    Attributes:
        rank: width of an adapter.
        alpha: its output is scaled by alpha / rank.
    """

    rank: int
    alpha: int


def lora_of_rank(rank: int) -> Lora | None:
    """Return adapters scaled by 2; None for the rank 0."""
    return Lora(rank, 2 * rank) if rank else None


@dataclass(frozen=True)
class Batch:
    """Rows as tensors; R rows, N visual tokens, T ids behind them.

    Attributes:
        visual: float32[R, N, D]; tower features the reducer left.
        valid: int64[R]; how many of them are real.
        before: int64[R, M]; ids in front of the picture.
        ids: int64[R, T]; padded with 0.
        targets: int64[R, T]; `IGNORED` where nothing is learned.
        positions: int64[R, T]; counted from the end of the picture in each conversation.
        blocks: int64[R, T]; number of the conversation, -1 for padding.
    """

    visual: Tensor
    valid: Tensor
    before: Tensor
    ids: Tensor
    targets: Tensor
    positions: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Score:
    """How a batch was answered.

    Attributes:
        loss_sum: cross-entropy summed over the answers' ids; has a gradient.
        targets: how many ids that is.
        right: answers of which every id was the likeliest.
        answers: how many answers there are.
    """

    loss_sum: Tensor
    targets: int
    right: int
    answers: int


def make_batch(rows: Sequence[Row], pictures: ReducedPictures) -> Batch:
    """Turn rows into tensors."""
    at = [pictures.index[row.image] for row in rows]
    length = max(sum(len(text.ids) for text in row.texts) for row in rows)
    table = np.full((len(rows), 4, length), np.array([[0], [IGNORED], [0], [-1]]), np.int64)
    for number, row in enumerate(rows):
        start = 0
        for block, text in enumerate(row.texts):
            end = start + len(text.ids)
            table[number, :, start:end] = (
                text.ids, text.targets, range(end - start), [block] * (end - start),
            )  # fmt: skip
            start = end
    ids, targets, positions, blocks = torch.from_numpy(table).unbind(1)
    before = torch.tensor([row.texts[0].before for row in rows])
    return Batch(
        torch.from_numpy(pictures.tokens[at]),
        torch.from_numpy(pictures.valid[at].astype(np.int64)),
        before, ids, targets, positions, blocks,
    )  # fmt: skip


class Student(nn.Module):
    """Projector and language model of a checkpoint; `tuned` says which parameters learn.

    Args:
        checkpoint: what to begin with.
        lora: adapters to add; None tunes the projector alone.
        precision: bf16 keeps the frozen language model in bfloat16 and computes under autocast;
            what learns is float32 either way.
        device: where to compute.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
        OptionError: adapters were asked for and `peft` is not installed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        lora: Lora | None,
        precision: TrainingPrecision = "fp32",
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self._bf16 = precision == "bf16"
        self._device = device
        self.projector = checkpoint.projector()
        llm: Any = checkpoint.language_model(torch.bfloat16 if self._bf16 else torch.float32)
        self.llm = llm.requires_grad_(False)
        if lora is not None:
            _add_adapters(self.llm, lora)
        self.to(device)

    @property
    def tuned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: one for name, one in self.named_parameters() if one.requires_grad}

    def score(self, batch: Batch) -> Score:
        """Predict each id of a batch from the correct ids before it."""
        with torch.autocast(torch.device(self._device).type, torch.bfloat16, enabled=self._bf16):
            logits, targets, answer = self._logits(batch)
        loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
        wrong = torch.zeros(int(answer[-1]) + 1, device=answer.device)
        wrong.index_add_(0, answer, (logits.argmax(-1) != targets).float())
        return Score(loss, len(targets), int((wrong == 0).sum()), len(wrong))

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits float[A, V] of the answers' ids, these ids, and each one's answer."""
        embed = self.llm.get_input_embeddings()
        visual = self.projector(batch.visual.to(self._device))  # [R, N, D_llm]
        ids = batch.ids.to(self._device)
        before = embed(batch.before.to(self._device))
        inputs = torch.cat([before, visual.to(before.dtype), embed(ids)], 1)
        front = before.shape[1] + visual.shape[1]
        mask, positions = _attention(batch, front)
        hidden = self.llm.get_decoder()(
            inputs_embeds=inputs,
            attention_mask=mask.to(self._device, inputs.dtype),
            position_ids=positions.to(self._device),
            use_cache=False,
        ).last_hidden_state[:, front:]
        wanted = batch.targets != IGNORED  # [R, T]
        # An answer begins where a target follows a position without one.
        begins = wanted & ~functional.pad(wanted, (1, 0))[:, :-1]
        begins |= wanted & (batch.positions == 0)
        answer = begins.flatten().cumsum(0).view_as(wanted)[wanted] - 1
        logits = self.llm.get_output_embeddings()(hidden[wanted.to(self._device)])
        return logits, batch.targets[wanted].to(self._device), answer.to(self._device)


def _attention(batch: Batch, front: int) -> tuple[Tensor, Tensor]:
    """Return the additive mask float32[R, 1, S, S] and positions int64[R, S]; S = front + T.

    What comes before the text is causal; text sees it, but not its padding, and of the text what
    precedes it in its own conversation.
    """
    rows, length = batch.blocks.shape
    total = front + length
    ends = batch.before.shape[1] + batch.valid[:, None]  # [R, 1]
    places = torch.arange(total)
    allowed = torch.ones(total, total, dtype=torch.bool).tril().expand(rows, -1, -1).clone()
    allowed[:, front:, front:] &= batch.blocks[:, :, None] == batch.blocks[:, None, :]
    padding = (places >= ends) & (places < front)  # [R, S]
    allowed &= ~padding[:, None, :] | torch.eye(total, dtype=torch.bool)
    lowest = torch.finfo(torch.bfloat16).min
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, lowest)[:, None]
    positions = torch.cat([places[:front].expand(rows, -1), ends + batch.positions], 1)
    return mask, positions


def _add_adapters(llm: nn.Module, lora: Lora) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise OptionError(
            "--lora-rank needs the package peft, which is not installed. Install it with "
            '`pip install "foveate[tuning]"`, or leave the option out to tune the projector alone.'
        ) from error
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear")
    inject_adapter_in_model(config, llm)
    for one in llm.parameters():
        if one.requires_grad:
            one.data = one.data.float()


def adapter_changes(llm: nn.Module) -> dict[str, Tensor]:
    """Return what the adapters add to each weight, float32, by the weight's plain name."""
    changes = {}
    for name, module in llm.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            changes[f"{name}.weight"] = module.get_delta_weight("default").detach().float().cpu()
    return changes
