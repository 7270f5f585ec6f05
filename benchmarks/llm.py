"""The language backends at TinyLlama's size: prefill with 64 and 576 visual tokens, and decoding.

Random weights take as long as trained ones. Each backend runs in a process of its own, one after
the other, so that its peak memory is its own; prefill is the fastest of the repeats, decoding the
mean over the answer. Goals: prefill of 576 at least 7 times that of 64; decoding at least as fast
as llama.cpp in Q4_K_M and 3 times as fast as transformers in float32.

    python -m benchmarks.llm
    python -m benchmarks.llm --json --threads 4 --keep build/tinyllama
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.errors import FoveateError
from runtime.language.parts import Embeddings

VISUAL_TOKENS = (64, 576)
TEXT_TOKENS = 32
BACKENDS = ("ort", "llamacpp", "transformers")
GOALS = {"prefill_576_over_64": 7.0, "decode_over_llamacpp": 1.0, "decode_over_transformers": 3.0}


@dataclass(frozen=True)
class Shape:
    """The size of a Llama; left as it is, TinyLlama's 1.1 billion weights.

    Attributes:
        hidden_size: D.
        intermediate_size: of the feed-forward layers.
        layers: how many.
        heads: attention heads, 64 wide at TinyLlama's size.
        key_value_heads: heads of the KV cache.
        vocabulary: token ids.
    """

    hidden_size: int = 2048
    intermediate_size: int = 5632
    layers: int = 22
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 32000


@dataclass(frozen=True)
class Times:
    """What one backend took.

    Attributes:
        backend: its name.
        prefill_ms: by number of visual tokens; 32 tokens of text are with them.
        decode_tokens_per_second: after 64 visual tokens.
        peak_memory_mb: resident, of the whole process.
    """

    backend: str
    prefill_ms: dict[int, float]
    decode_tokens_per_second: float
    peak_memory_mb: float


Forward = Callable[[Embeddings], int]
"""Rows appended to the conversation -> the likeliest next token."""


def write_random_bundle(directory: Path, shape: Shape) -> Path:
    """Write a checkpoint with random weights and a bundle of it; return the bundle."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    from export.build import build_bundle
    from export.build.plan import BuildOptions
    from export.language.language_models import DecoderOptions

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=2048,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    checkpoint = directory / "checkpoint"
    torch.set_default_dtype(torch.float16)
    try:
        LlavaForConditionalGeneration(config).save_pretrained(checkpoint)
    finally:
        torch.set_default_dtype(torch.float32)
    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "<image>"))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    size = {"height": 28, "width": 28}
    processor: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": size}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    kind = {"image_processor_type": "CLIPImageProcessor"}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(processor | kind))
    build_bundle(
        BuildOptions(
            str(checkpoint),
            directory / "bundle",
            tokens=(8,),
            decoders=DecoderOptions(("ort", "llamacpp")),
        )
    )
    return directory / "bundle"


def measure(bundle: Bundle, backend: str, threads: int, answer: int, repeats: int) -> Times:
    """Measure one backend in this process."""
    start = _transformers if backend == "transformers" else _ours
    restart, forward = start(bundle, backend, threads)
    width = bundle.manifest.text.hidden_size
    random = np.random.default_rng(0)
    prefill_ms: dict[int, float] = {}
    for count in reversed(VISUAL_TOKENS):  # 64 last: decoding goes on from there
        rows = random.normal(0, 0.02, (count + TEXT_TOKENS, width)).astype(np.float32)
        spent = []
        for _ in range(repeats + 1):  # the first one warms up
            restart()
            began = time.perf_counter()
            token = forward(rows)
            spent.append((time.perf_counter() - began) * 1e3)
        prefill_ms[count] = round(min(spent[1:]), 1)
    from runtime.language.embeddings import EmbeddingTable

    table = EmbeddingTable(bundle)
    began = time.perf_counter()
    for _ in range(answer):
        token = forward(table.rows(np.array([token])))
    seconds = time.perf_counter() - began
    return Times(backend, prefill_ms, round(answer / seconds, 2), _peak_memory_mb())


def _peak_memory_mb() -> float:
    """Return the most memory this process held; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return round(int(peak) / 1024, 0)


def _ours(bundle: Bundle, name: str, threads: int) -> tuple[Callable[[], None], Forward]:
    from runtime.backends.opening import open_backend

    backend = open_backend(bundle, name, threads=threads, context_length=1024)
    return lambda: backend.rewind(0), lambda rows: int(backend.prefill([rows]).argmax())


def _transformers(bundle: Bundle, _: str, threads: int) -> tuple[Callable[[], None], Forward]:
    import torch
    from transformers import DynamicCache

    from export.checkpoint.llava import open_checkpoint

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(bundle.root.parent / "checkpoint")
    model = checkpoint.language_model(torch.float32)
    cache = DynamicCache()

    def restart() -> None:
        nonlocal cache
        cache = DynamicCache()

    @torch.inference_mode()
    def forward(rows: Embeddings) -> int:
        embeds = torch.from_numpy(rows)[None]  # [1, N, D]
        out = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return restart, forward


def compare(times: list[Times]) -> dict[str, float]:
    """Return the ratios that the goals are about."""
    by_name = {each.backend: each for each in times}
    ours = by_name["ort"]
    few, many = (ours.prefill_ms[count] for count in VISUAL_TOKENS)
    ratios = {"prefill_576_over_64": round(many / few, 2)}
    for other in ("llamacpp", "transformers"):
        if other in by_name:
            ratio = ours.decode_tokens_per_second / by_name[other].decode_tokens_per_second
            ratios[f"decode_over_{other}"] = round(ratio, 2)
    return ratios


def _measure_apart(bundle: Path, backend: str, threads: int, answer: int, repeats: int) -> Times:
    command = [sys.executable, "-m", "benchmarks.llm", "--json", "--keep", str(bundle.parent)]
    command += ["--only", backend, "--threads", str(threads)]
    command += ["--answer-tokens", str(answer), "--repeats", str(repeats)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise FoveateError(f"Measuring {backend} failed: {finished.stderr.strip()[-600:]}")
    fields = json.loads(finished.stdout)
    prefill_ms = {int(count): ms for count, ms in fields.pop("prefill_ms").items()}
    return Times(prefill_ms=prefill_ms, **fields)


def main(
    threads: Annotated[int, typer.Option(help="CPU threads of every backend.")] = 2,
    answer_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    repeats: Annotated[int, typer.Option(help="Prefills of each length; the fastest counts.")] = 3,
    keep: Annotated[
        Path | None, typer.Option(help="Directory for the random model, used again if it is there.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Measure one backend in this process.", hidden=True)
    ] = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Time the language backends on a random model of 1.1 billion weights (about 6 GB of disk).

    Exit code 1 says that a goal was missed.
    """
    with ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = directory / "bundle"
        if not bundle.is_dir():
            print("Writing a random model and its bundle ...", file=sys.stderr)
            write_random_bundle(directory, Shape())
        if only is not None:
            opened = open_bundle(bundle, verify=False)
            cli.print_json(vars(measure(opened, only, threads, answer_tokens, repeats)))
            return 0
        times = []
        for backend in BACKENDS:
            print(f"Measuring {backend} ...", file=sys.stderr)
            times.append(_measure_apart(bundle, backend, threads, answer_tokens, repeats))
    ratios = compare(times)
    _tell(times, ratios, as_json)
    return 0 if all(ratios[name] >= goal for name, goal in GOALS.items()) else 1


def _tell(times: list[Times], ratios: dict[str, float], as_json: bool) -> None:
    if as_json:
        document: dict[str, Any] = {"backends": [vars(each) for each in times]}
        cli.print_json(document | {"ratios": ratios, "goals": GOALS})
        return
    print(f"{'backend':14}{'prefill 64':>14}{'prefill 576':>14}{'decode':>12}{'memory':>12}")
    for each in times:
        few, many = (f"{each.prefill_ms[count]:.0f} ms" for count in VISUAL_TOKENS)
        speed = f"{each.decode_tokens_per_second:.1f}/s"
        print(f"{each.backend:14}{few:>14}{many:>14}{speed:>12}{each.peak_memory_mb:>9.0f} MB")
    for name, goal in GOALS.items():
        print(f"{name:28}{ratios[name]:6.2f}  (goal: at least {goal:g})")


if __name__ == "__main__":
    cli.run(main, ("`python -m benchmarks.llm --keep build/tinyllama`",))
