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

EXAMPLES = ("python -m engines.estimate --model llava-1.5-7b --tokens 64 --target jetson-orin",)


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

    @property
    def needed_bytes(self) -> float:
        """What the tower and the language model take with the reduced prompt."""
        return self.reduced.memory_bytes + self.vision_bytes

    @property
    def fits(self) -> bool:
        """Whether both fit the memory."""
        return self.needed_bytes <= self.available_bytes


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
    half = Bits(16, 16, 16)
    tower = list_costs(CLIP_L_336, CLIP_L_336_POSITIONS, half)
    return Comparison(
        reduced=reduced,
        full=full,
        reduced_paper_operations=visionzip_operations(shape, reduced.prompt_tokens),
        full_paper_operations=visionzip_operations(shape, full.prompt_tokens),
        vision_ms=least_seconds(tower, roof, half) * 1e3,
        vision_bytes=total_cost(tower).weight_bytes,
        available_bytes=options.target.free_bytes,
    )


def _print_comparison(options: EstimateOptions, found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.model}, {options.llm_precision}, on {options.target.title}: bounds, "
        "not measurements",
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
        ("weights, GB", few.weight_bytes / 1e9, all_.weight_bytes / 1e9, ".2f"),
        ("KV cache, MB", few.kv_bytes / 1e6, all_.kv_bytes / 1e6, ".0f"),
        ("memory, at least, GB", few.memory_bytes / 1e9, all_.memory_bytes / 1e9, ".2f"),
    ]
    for name, left, right, style in rows:
        table.add_row(name, f"{left:{style}}", f"{right:{style}}", f"{right / left:.2f}")
    console = Console()
    console.print(table)
    verdict = "fits" if found.fits else "does NOT fit"
    console.print(
        f"It {verdict}: {few.memory_bytes / 1e9:.2f} GB and {found.vision_bytes / 1e9:.2f} GB for "
        f"the vision tower, of about {found.available_bytes / 1e9:.1f} GB free on "
        f"{options.target.name}."
    )


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
        "fits": found.fits,
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
    )
    found = compare_budgets(options)
    if as_json:
        cli.print_json(_json_of(options, found))
    else:
        _print_comparison(options, found)


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
