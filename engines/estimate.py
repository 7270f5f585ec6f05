"""Estimate what a model costs on a device: `python -m engines.estimate`.

The table compares a token budget with all tokens: operations, least prefill time, most tokens per
second, memory, and whether it fits. Neither the model nor the device is needed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from engines import cli
from engines.errors import OptionError
from engines.llm_words import KvCache
from engines.memory.context_length import ContextNeed
from engines.memory.of_model import ModelPlan, need_of_model, what_would_fit
from engines.memory.parts import MemoryNeed
from engines.roofline import (
    CLIP_L_336,
    CLIP_L_336_POSITIONS,
    LLM_PRECISIONS,
    MODELS,
    Bits,
    Estimate,
    TransformerShape,
    estimate_answer,
    least_seconds,
    list_costs,
    roof_of,
    shape_from_config,
    total_cost,
    visionzip_operations,
)
from engines.targets import Target, find_target

EXAMPLES = (
    "python -m engines.estimate --model llava-1.5-7b --tokens 64 --target jetson-orin",
    "python -m engines.estimate --target jetson-orin-nano --context 4096 --kv-cache q8",
)


@dataclasses.dataclass(frozen=True)
class EstimateOptions:
    """What to estimate."""

    model: str
    target: Target
    tokens: int
    all_tokens: int
    text_tokens: int
    new_tokens: int
    llm_precision: str
    backend: str = "llamacpp"
    context: int | None = None
    kv_cache: KvCache = "f16"

    def plan_of(self, visual_tokens: int) -> ModelPlan:
        """Return how the model is run with a number of visual tokens."""
        need = ContextNeed(visual_tokens, self.text_tokens, self.new_tokens, exchanges=1)
        return ModelPlan(self.backend, self.llm_precision, need, self.context, self.kv_cache)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The budget and all tokens, side by side."""

    reduced: Estimate
    full: Estimate
    reduced_paper_operations: int
    full_paper_operations: int
    vision_ms: float
    vision_bytes: float
    """Weights of the vision tower, in FP16."""
    available_bytes: float
    reduced_memory: MemoryNeed
    full_memory: MemoryNeed
    would_fit: list[str]
    """Changes that make it fit, each alone; empty where it fits."""

    @property
    def fits(self) -> bool:
        """Whether everything fits the memory with the reduced prompt."""
        return self.reduced_memory.total_bytes <= self.available_bytes


def find_shape(model: str) -> TransformerShape:
    """Return the shape of a known model, a checkpoint directory or a `config.json`."""
    return MODELS[model] if model in MODELS else shape_from_config(Path(model))


def compare_budgets(options: EstimateOptions) -> Comparison:
    """Estimate one question with the token budget and with all tokens.

    Raises:
        OptionError: an option out of range, or a target without peaks.
        CheckpointError: the model cannot be read.
    """
    if options.llm_precision not in LLM_PRECISIONS:
        raise OptionError(
            f"--llm-precision {options.llm_precision}: not one of {', '.join(LLM_PRECISIONS)}."
        )
    counts = (options.tokens, options.all_tokens, options.text_tokens, options.new_tokens)
    if min(counts) < 1:
        raise OptionError("token counts must be 1 or more; say --tokens 64, for example.")
    roof = roof_of(options.target)
    shape = find_shape(options.model)
    bits = LLM_PRECISIONS[options.llm_precision]
    reduced, full = (
        estimate_answer(
            shape,
            roof,
            bits,
            prompt_tokens=visual + options.text_tokens,
            new_tokens=options.new_tokens,
        )
        for visual in (options.tokens, options.all_tokens)
    )
    needs = [
        need_of_model(shape, options.target, options.plan_of(visual))
        for visual in (options.tokens, options.all_tokens)
    ]
    free = options.target.free_bytes
    would_fit = []
    if needs[0].total_bytes > free:
        would_fit = what_would_fit(shape, options.target, options.plan_of(options.tokens), free)
    half = Bits(16, 16, 16)
    tower = list_costs(CLIP_L_336, CLIP_L_336_POSITIONS, half)
    return Comparison(
        reduced=reduced,
        full=full,
        reduced_paper_operations=visionzip_operations(shape, reduced.prompt_tokens),
        full_paper_operations=visionzip_operations(shape, full.prompt_tokens),
        vision_ms=least_seconds(tower, roof, half) * 1e3,
        vision_bytes=total_cost(tower).weight_bytes,
        available_bytes=free,
        reduced_memory=needs[0],
        full_memory=needs[1],
        would_fit=would_fit,
    )


def _print_comparison(options: EstimateOptions, found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.model}, {options.llm_precision}, on {options.target.title}: times "
        "are bounds, not measurements",
        caption=f"{options.text_tokens} text tokens, {options.new_tokens} new tokens, batch 1. "
        f"CLIP-L/336 in FP16 takes at least {found.vision_ms:.1f} ms.",
    )
    table.add_column("")
    for tokens in (options.tokens, options.all_tokens):
        table.add_column(f"{tokens} visual tokens", justify="right")
    table.add_column("ratio", justify="right")
    few, all_ = found.reduced, found.full
    rows: list[tuple[str, float, float, str]] = [
        ("prefill, TFLOP", few.prefill_operations / 1e12, all_.prefill_operations / 1e12, ".2f"),
        (
            "the same as VisionZip counts",
            found.reduced_paper_operations / 1e12,
            found.full_paper_operations / 1e12,
            ".2f",
        ),
        ("prefill, at least, ms", few.prefill_ms, all_.prefill_ms, ".1f"),
        ("decoding, at most, tokens/s", few.decode_tokens_s, all_.decode_tokens_s, ".1f"),
    ]
    names = dict.fromkeys(
        _without_count(part.name)
        for part in (*found.reduced_memory.parts, *found.full_memory.parts)
    )
    for name in names:
        less, more, sign = _part_of(found, name)
        rows.append((f"{name}, MB{sign}", less / 1e6, more / 1e6, ",.0f"))
    totals = found.reduced_memory.total_bytes / 1e9, found.full_memory.total_bytes / 1e9
    rows.append(("memory, GB", *totals, ".2f"))
    for name, left, right, style in rows:
        table.add_row(name, f"{left:{style}}", f"{right:{style}}", f"{right / left:.2f}")
    console = Console()
    console.print(table)
    verdict = "fits" if found.fits else "does NOT fit"
    console.print(
        f"It {verdict} with {options.backend}: {totals[0]:.2f} GB of about "
        f"{found.available_bytes / 1e9:.1f} GB free on {options.target.name}. (~ by a formula that "
        "no such device has confirmed; the rest is counted.)"
    )
    if not found.fits:
        would = "; ".join(found.would_fit) or "a smaller model, or a device with more memory"
        console.print(f"What would: {would}.")


def _without_count(name: str) -> str:
    return name.split(",", maxsplit=1)[0]


def _part_of(found: Comparison, name: str) -> tuple[int, int, str]:
    """Return one part with few tokens and with all, and a sign where it is an estimate."""
    few, all_ = (
        next(part for part in need.parts if _without_count(part.name) == name)
        for need in (found.reduced_memory, found.full_memory)
    )
    return few.bytes, all_.bytes, " (~)" if few.basis == "estimate" else ""


def _json_of(options: EstimateOptions, found: Comparison) -> dict[str, Any]:
    def estimate(value: Estimate) -> dict[str, Any]:
        return {**dataclasses.asdict(value), "memory_bytes": value.memory_bytes}

    return {
        "model": options.model,
        "target": options.target.name,
        "llm_precision": options.llm_precision,
        "reduced": estimate(found.reduced),
        "full": estimate(found.full),
        "vision_ms": found.vision_ms,
        "vision_bytes": found.vision_bytes,
        "available_bytes": found.available_bytes,
        "backend": options.backend,
        "context": options.plan_of(options.tokens).positions,
        "kv_cache": options.kv_cache,
        "memory": [dataclasses.asdict(part) for part in found.reduced_memory.parts],
        "needed_bytes": found.reduced_memory.total_bytes,
        "fits": found.fits,
        "would_fit": found.would_fit,
    }


def main(
    *,
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}, or a checkpoint directory.")
    ] = "llava-1.5-7b",
    target: Annotated[str, typer.Option(help="See python -m engines.targets.")] = "jetson-orin",
    tokens: Annotated[int, typer.Option(help="Visual tokens after reduction.")] = 64,
    all_tokens: Annotated[int, typer.Option(help="Visual tokens without reduction.")] = 576,
    text_tokens: Annotated[int, typer.Option(help="System prompt and question.")] = 40,
    new_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 32,
    llm_precision: Annotated[str, typer.Option(help=", ".join(LLM_PRECISIONS))] = "int4",
    backend: Annotated[str, typer.Option(help="llamacpp or ort, whose memory differs.")] = (
        "llamacpp"
    ),
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Positions of the KV cache; left out, prompt and answer."),
    ] = None,
    kv_cache: cli.KvCacheOption = "f16",
    targets: Annotated[Path | None, typer.Option(help="Your own targets (TOML).")] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Estimate prefill, decoding and memory from a device's peaks. Bounds, not measurements."""
    options = EstimateOptions(
        model=model,
        target=find_target(target, targets),
        tokens=tokens,
        all_tokens=all_tokens,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        llm_precision=llm_precision,
        backend=backend,
        context=context,
        kv_cache=kv_cache,
    )
    found = compare_budgets(options)
    if as_json:
        cli.print_json(_json_of(options, found))
    else:
        _print_comparison(options, found)


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
