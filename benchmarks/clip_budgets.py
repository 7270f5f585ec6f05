"""What a total of visual tokens costs in right answers about clips, through built bundles.

A LLaVA-OneVision checkpoint is built into one bundle with all tokens and one for each reducer. Each
clip is written to a video file without loss, read as `runtime.ask` reads it, and asked about
through the bundle's graphs and language model on ONNX Runtime, greedily. With all tokens the frames
are pooled, as in training; with a reducer their tokens are single patches, and the total is shared
by what is new in each frame.

    python models/pocket-onevision/events.py --seed 20261121 --count 500 --out CLIPS
    python -m benchmarks.clip_budgets --model models/pocket-onevision --clips CLIPS --json

Bundles and results are kept under `build/clip_budgets`, so an interrupted run continues where it
stood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.packed_answers import POCKET
from engines.bundle import open_bundle
from export.build import BuildOptions, build_bundle
from export.language.language_models import DecoderOptions
from export.reducers import Budget
from runtime.clips.clip import ask_about_clip, frames_to_look_at, read_clip
from runtime.clips.clip_options import ClipOptions
from runtime.frames import Frame
from runtime.language.generate import GenerationOptions
from runtime.model import open_model
from runtime.vision.graph_pool import GraphPool

from evaluate import HeldOut, describe, paired_interval, read_held_out  # isort: skip - of POCKET

ONEVISION = POCKET.parent / "pocket-onevision"
TOTALS = (64, 32)
"""Of 289: 64, and a ninth."""
REDUCERS: dict[str, tuple[int, ...]] = {
    "scope": (64,),
    "divprune": (64,),
    "top_attention": (64,),
    "uniform": (2, 4, 8, 16, 32, 64),
    "random": (2, 4, 8, 16, 32, 64),
}
"""Reducer -> the budgets of its bundle; one that ranks gives a frame any number up to its own."""
ALL = "all tokens"
_LONGEST_ANSWER = 24
_KEPT = Path("build/clip_budgets")

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        reducer: its name, or `ALL`.
        total: visual tokens that a clip may cost; None: all.
        clips: how many.
        mean_tokens: that a clip did cost, the newline at its end included.
        right: bool[Q]; which questions were answered exactly.
    """

    reducer: str
    total: int | None
    clips: int
    mean_tokens: float
    right: list[bool]

    @property
    def setting(self) -> tuple[str, int | None, int]:
        """What was measured."""
        return self.reducer, self.total, self.clips


@app.command()
def main(
    clips: Annotated[Path, typer.Option(help="Folder that events.py wrote.")],
    model: Annotated[Path, typer.Option(help="LLaVA-OneVision checkpoint.")] = ONEVISION,
    count: Annotated[int | None, typer.Option(min=1, help="The first so many clips only.")] = None,
    reducers: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(REDUCERS),
    totals: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(map(str, TOTALS)),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure exact match of every reducer and total."""
    held_out = read_held_out(clips, "clip")
    held_out = HeldOut(held_out.paths[:count], held_out.questions[:count])
    names = reducers.split(",")
    if unknown := set(names) - REDUCERS.keys():
        raise typer.BadParameter(f"There is no {', '.join(unknown)}: {', '.join(REDUCERS)}.")
    bench = Bench(model, held_out, threads)
    settings: list[tuple[str, int | None]] = [(ALL, None)]
    settings += [(name, int(total)) for total in totals.split(",") for name in names]
    results = [
        bench.measure(*setting)
        for setting in track(settings, "Asking about clips", console=Console(stderr=True))
    ]
    print(json.dumps(summary_of(results, held_out)) if as_json else table_of(results, held_out))


class Bench:
    """Measures rows, and keeps what it built and measured.

    Args:
        model: the checkpoint.
        held_out: clips and questions.
        threads: of ONNX Runtime.
    """

    def __init__(self, model: Path, held_out: HeldOut, threads: int) -> None:
        self._model, self._held_out, self._threads = model, held_out, threads
        digest = hashlib.sha256((model / "model.safetensors").read_bytes())
        for path, asked in zip(held_out.paths, held_out.questions, strict=True):
            digest.update(f"{path.resolve()} {asked!r}".encode())
        self._folder = _KEPT / digest.hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines = self._folder / "results.jsonl"

    def measure(self, reducer: str, total: int | None) -> Result:
        """Return one row, measured now unless it was before."""
        lines = self._lines.read_text("utf-8").splitlines() if self._lines.exists() else []
        kept = {one.setting: one for one in (Result(**json.loads(line)) for line in lines)}
        if known := kept.get((reducer, total, len(self._held_out.paths))):
            return known
        right: list[bool] = []
        spent: list[int] = []
        with (
            open_model(self._bundle(reducer), threads=self._threads) as opened,
            GraphPool(opened.bundle, threads=self._threads, opened=opened.encoder) as pool,
        ):
            options = GenerationOptions(max_tokens=_LONGEST_ANSWER)
            for frames, asked in self._clips(frames_to_look_at(opened.bundle, ClipOptions())):
                for question in asked:
                    answer = ask_about_clip(
                        opened, frames, question.text, pool, total=total, generation=options
                    )
                    right.append(answer.text.strip() == question.answer)
                spent.append(answer.visual_tokens)
        result = Result(reducer, total, len(spent), float(np.mean(spent)), right)
        with self._lines.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(result)) + "\n")
        return result

    def _clips(self, most: int) -> Iterator[tuple[list[Frame], list[Any]]]:
        """Yield the frames of each clip, read from its video file, and what is asked about it."""
        for path, asked in zip(self._held_out.paths, self._held_out.questions, strict=True):
            yield read_clip(str(self._video(path)), ClipOptions(clip_frames=most)), asked

    def _video(self, clip: Path) -> Path:
        """Return a clip as a video file, written unless it is there."""
        file = self._folder / "videos" / f"{clip.name}.mkv"
        if not file.exists():
            from clip_video import read_pictures, write_video

            file.parent.mkdir(exist_ok=True)
            unfinished = file.with_suffix(".part.mkv")
            write_video(read_pictures(clip), unfinished)
            unfinished.rename(file)
        return file

    def _bundle(self, reducer: str) -> Path:
        """Return the bundle of a reducer, built unless it is there."""
        out = self._folder / reducer.replace(" ", "_")
        if not out.exists():
            name = "none" if reducer == ALL else reducer
            tokens: tuple[Budget, ...] = REDUCERS.get(reducer, ("all",))
            decoders = DecoderOptions(precision="fp32")
            build_bundle(
                BuildOptions(str(self._model), out, reducer=name, tokens=tokens, decoders=decoders)
            )
        return open_bundle(out, verify=False).root


def summary_of(results: Sequence[Result], held_out: HeldOut) -> dict[str, Any]:
    """Return every row, the first of which has all tokens."""
    about = np.repeat(np.arange(len(held_out.paths)), list(map(len, held_out.questions)))
    every = _right(results[0])
    rows = []
    for one in results:
        kept = paired_interval(_right(one), every, about, ratio=True) if every.any() else None
        cells = {"reducer": one.reducer, "total": one.total, "mean_tokens": one.mean_tokens}
        rows.append({**cells, **describe(_right(one)), "kept": kept})
    return {"clips": len(held_out.paths), "rows": rows}


def _right(result: Result) -> NDArray[np.float64]:
    return np.array(result.right, np.float64)


def table_of(results: Sequence[Result], held_out: HeldOut) -> str:
    """Return a Markdown table."""
    summary = summary_of(results, held_out)
    lines = [
        f"{len(results[0].right):,} questions about {summary['clips']} clips.",
        "",
        "| total | reducer | tokens of a clip | exact match (95 %) | of all tokens' (95 %) |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in summary["rows"]:
        low, high = (100 * end for end in row["interval"])
        of_all = "" if row["kept"] is None else "{:.1%} to {:.1%}".format(*row["kept"])
        total = "" if row["total"] is None else row["total"]
        lines.append(
            f"| {total} | {row['reducer']} | {row['mean_tokens']:.1f} | "
            f"{row['exact']:.1%} ({low:.1f} to {high:.1f}) | {of_all} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
