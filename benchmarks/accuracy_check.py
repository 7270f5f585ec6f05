"""Is the fast way of `benchmarks.accuracy` what the runtime would have answered?

A bundle of the pocket checkpoint (float32, VisionZip) is asked some of the held-out questions one
by one, as `runtime.ask` does it. Claims: the text is that of transformers' greedy decoding behind
the same visual tokens, and it is right exactly where the packed pass says so.

    python -m benchmarks.accuracy_check --questions 100 --json
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.packed_answers import POCKET, Examination
from engines.bundle import open_bundle
from export.build import build_bundle
from export.build.plan import BuildOptions
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.verify.reference import LanguageReference
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import PromptWriter, Turn
from runtime.model import open_model
from runtime.vision.pictures import load_picture

_LONGEST = 24

app = typer.Typer(add_completion=False)


@app.command()
def main(
    questions: Annotated[int, typer.Option(min=1, help="Evenly taken from all.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="Visual tokens left.")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare the runtime's answers with transformers' and with the packed verdicts."""
    examination = Examination(POCKET, POCKET / "test")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        options = BuildOptions(
            model=str(POCKET),
            out=out,
            tokens=(tokens,),
            precision="fp32",
            decoders=DecoderOptions(precision="fp32"),
        )
        build_bundle(options)
        report = compare(out, examination, questions, threads)
    report = {"tokens": tokens, **report}
    print(json.dumps(report) if as_json else "\n".join(f"{k:16} {v}" for k, v in report.items()))
    raise typer.Exit(0 if report["met"] else 1)


def compare(out: Path, examination: Examination, count: int, threads: int) -> dict[str, Any]:
    """Ask a bundle, transformers and the packed pass the same questions."""
    asked = [one for questions in examination.questions for one in questions]
    chosen = np.linspace(0, len(asked) - 1, min(count, len(asked))).astype(int)
    bundle = open_bundle(out)
    writer, reference = PromptWriter(bundle), LanguageReference(open_checkpoint(POCKET))
    same_text = same_verdict = right = 0
    with open_model(bundle, threads=threads) as model:
        for at in track(chosen.tolist(), "Asking", console=Console(stderr=True)):
            question, picture = asked[at], int(examination.picture_of[at])
            answer = model.ask(
                load_picture(examination.pictures[picture]),
                question.text,
                GenerationOptions(max_tokens=_LONGEST),
            )
            visual = answer.seen[0]
            parts = writer.parts([Turn("user", question.text, images=1)], [visual.tokens_of(0)])
            _, ids = reference.answer(parts, _LONGEST, writer.stop_token_ids)
            packed = examination.right_answers_about(picture, visual.tokens, visual.valid)
            is_right = answer.text.strip() == question.answer
            same_text += answer.token_ids == tuple(ids)
            verdict = bool(packed[examination.questions[picture].index(question)])
            same_verdict += is_right == verdict
            right += is_right
    return {
        "questions": len(chosen),
        "right": right,
        "same_text": same_text,
        "same_verdict": same_verdict,
        "met": same_text == len(chosen) and same_verdict == len(chosen),
    }


if __name__ == "__main__":
    app()
