"""What writing the vision graph in float16 costs: patches kept, tokens, answers.

One checkpoint is built twice, float32 and float16, and both bundles are asked the same questions
about the same held-out pictures on ONNX Runtime. Claims: patches shared >= 0.99, mean cosine of
matched tokens >= 0.999, accuracy within 0.5 points.

    python -m benchmarks.half_precision --data models/pocket-llava/test --json

The folder holds pictures and `questions.jsonl`: image, question and answer on each line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from engines.bundle import open_bundle
from export.build import build_bundle
from export.build_plan import BuildOptions
from runtime.generate import GenerationOptions
from runtime.model import Model, open_model
from runtime.pictures import load_picture
from runtime.vision import VisualTokens

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of pictures and questions.jsonl.")],
    model: Annotated[str, typer.Option(help="LLaVA checkpoint.")] = "models/pocket-llava",
    reducer: Annotated[str, typer.Option()] = "visionzip",
    tokens: Annotated[int, typer.Option(help="Visual tokens left.")] = 64,
    limit: Annotated[
        int | None, typer.Option(help="Ask this many questions, evenly taken.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare a float16 bundle with a float32 one, patch by patch and answer by answer."""
    lines = (data / "questions.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    if limit is not None:
        questions = questions[:: max(1, len(questions) // limit)][:limit]
    with TemporaryDirectory() as folder:
        full, half = (
            _open(model, Path(folder) / precision, precision, reducer, tokens)
            for precision in ("fp32", "fp16")
        )
        with full, half:
            report = _compare(full, half, data, questions)
    report = {"model": model, "reducer": reducer, "tokens": tokens, **report}
    print(json.dumps(report) if as_json else _table(report))
    raise typer.Exit(0 if report["met"] else 1)


def _open(model: str, out: Path, precision: Any, reducer: str, tokens: int) -> Model:
    print(f"building the {precision} bundle ...", file=sys.stderr)
    build_bundle(
        BuildOptions(
            model=model,
            out=out,
            target="jetson-orin",
            precision=precision,
            reducer=reducer,
            tokens=(tokens,),
            llm_precision="fp32",
        )
    )
    return open_model(open_bundle(out), engine="ort")


def _compare(
    full: Model, half: Model, data: Path, questions: list[dict[str, str]]
) -> dict[str, Any]:
    kept = shared = 0
    cosines: list[float] = []
    right = {"fp32": 0, "fp16": 0}
    equal = 0
    pictures: set[str] = set()
    options = GenerationOptions(max_tokens=16)
    for number, asked in enumerate(questions):
        print(f"\rquestion {number + 1} of {len(questions)}", end="", file=sys.stderr)
        picture = load_picture(data / asked["image"])
        mine, other = (model.ask(picture, asked["question"], options) for model in (full, half))
        right["fp32"] += mine.text.strip() == asked["answer"]
        right["fp16"] += other.text.strip() == asked["answer"]
        equal += mine.text == other.text
        if asked["image"] not in pictures:
            pictures.add(asked["image"])
            total, same, matched = _match(mine.seen[0], other.seen[0])
            kept, shared = kept + total, shared + same
            cosines += matched
    print(file=sys.stderr)
    count = len(questions)
    accuracy = {name: 100 * hits / count for name, hits in right.items()}
    met = (
        shared >= 0.99 * kept
        and float(np.mean(cosines)) >= 0.999
        and abs(accuracy["fp32"] - accuracy["fp16"]) <= 0.5
    )
    return {
        "pictures": len(pictures),
        "questions": count,
        "patches_shared": round(shared / kept, 5),
        "cosine_mean": round(float(np.mean(cosines)), 7),
        "cosine_least": round(float(np.min(cosines)), 7),
        "accuracy_percent": {name: round(value, 2) for name, value in accuracy.items()},
        "answers_equal_percent": round(100 * equal / count, 2),
        "met": met,
    }


def _match(full: VisualTokens, half: VisualTokens) -> tuple[int, int, list[float]]:
    """Return patches kept, how many of them both keep, and the cosines of tokens in one place."""
    mine, other = full.origin[0], half.origin[0]
    shared = len(np.intersect1d(mine[mine >= 0], other[other >= 0]))
    rows = min(int(full.valid[0]), int(half.valid[0]))
    a, b = full.tokens[0, :rows], half.tokens[0, :rows]
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / norms
    return int((mine >= 0).sum()), shared, cosines[mine[:rows] == other[:rows]].tolist()


def _table(report: dict[str, Any]) -> str:
    accuracy = report["accuracy_percent"]
    return "\n".join(
        (
            f"{report['model']}, {report['reducer']} {report['tokens']}: "
            f"{report['pictures']} pictures, {report['questions']} questions",
            f"  patches shared   {report['patches_shared']:.4f}   (goal >= 0.99)",
            f"  cosine of tokens {report['cosine_mean']:.6f}, least {report['cosine_least']:.6f}"
            "   (goal >= 0.999)",
            f"  accuracy         {accuracy['fp32']:.2f} % -> {accuracy['fp16']:.2f} %"
            "   (goal within 0.5)",
            f"  same answers     {report['answers_equal_percent']:.2f} %",
        )
    )


if __name__ == "__main__":
    app()
