"""What each language backend and precision says about held-out pictures, against ONNX Runtime fp32.

Every variant gets the same visual tokens. Claims: the same greedy text in conversations of three
turns about 50 pictures from llama.cpp F16 (and from vLLM in float32, with --llm-url); logits within
1e-3 in float32; and accuracy within 1 point of fp32 for each quantized decoder.

    python -m benchmarks.language_backends
    python -m export.served_model models/pocket-llava build/pocket-llm
    vllm serve build/pocket-llm --dtype float32 --enable-prompt-embeds \\
      --chat-template-content-format openai
    python -m benchmarks.language_backends --llm-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from engines import cli
from engines.bundle import Bundle, open_bundle
from engines.manifest import LlmPrecision
from export.build import build_bundle
from export.build.plan import BuildOptions
from export.language.gguf_quantize import GgufPrecision
from export.language.language_models import DecoderOptions
from runtime.backends.chat_server import ServerOptions
from runtime.conversation import Conversation
from runtime.language.generate import GenerationOptions
from runtime.language.parts import Embeddings, Logits
from runtime.language.prompt import Turn
from runtime.model import Model, open_model
from runtime.vision.pictures import load_picture

VARIANTS: tuple[tuple[str, str], ...] = (
    ("ort", "fp32"),
    ("ort", "int8"),
    ("ort", "int4"),
    ("openvino", "fp32"),
    ("openvino", "int8"),
    ("openvino", "int4"),
    ("llamacpp", "f32"),
    ("llamacpp", "f16"),
    ("llamacpp", "q8_0"),
    ("llamacpp", "q4_k_m"),
)
SAME_TEXT = ("openvino fp32", "llamacpp f32", "llamacpp f16", "vllm fp32")
EXACT_LOGITS = ("openvino fp32", "llamacpp f32")
MOST_LOGITS = 1e-3
MOST_POINTS = 1.0
TURNS = 3
_OPTIONS = GenerationOptions(max_tokens=24)


@dataclass(frozen=True)
class HeldOut:
    """Pictures, and what is asked about each.

    Attributes:
        folder: where they lie.
        questions: of each picture; fields `question` and `answer`.
    """

    folder: Path
    questions: dict[str, list[dict[str, str]]]

    @classmethod
    def read(cls, folder: Path, pictures: int | None) -> HeldOut:
        """Read a folder of pictures and `questions.jsonl`."""
        asked: dict[str, list[dict[str, str]]] = defaultdict(list)
        for line in (folder / "questions.jsonl").read_text("utf-8").splitlines():
            fields = json.loads(line)
            asked[fields["image"]].append(fields)
        return cls(folder, dict(list(asked.items())[:pictures]))


@dataclass(frozen=True)
class Heard:
    """What one variant said.

    Attributes:
        turns: answers of the conversations, in order.
        answers: to every question on its own.
        right: bool of each.
        logits: float32[L, V] along the answers of fp32; None where a backend gives none.
    """

    turns: list[str]
    answers: list[str]
    right: np.ndarray[Any, np.dtype[np.bool_]]
    logits: Logits | None


@dataclass(frozen=True)
class Row:
    """One variant against fp32.

    Attributes:
        variant: backend and precision.
        same_turns: answers of conversations with the same text.
        turns: how many there are.
        largest_logit_difference: along the answers of fp32; None where a backend gives no logits.
        accuracy_percent: of all questions.
        points: accuracy minus that of fp32.
        points_interval: 95 %, for paired answers.
        same_answers_percent: of all questions.
    """

    variant: str
    same_turns: int
    turns: int
    largest_logit_difference: float | None
    accuracy_percent: float
    points: float
    points_interval: tuple[float, float]
    same_answers_percent: float

    @property
    def met(self) -> bool:
        """Whether it keeps what is claimed of it."""
        same = self.variant not in SAME_TEXT or self.same_turns == self.turns
        largest = self.largest_logit_difference
        exact = self.variant not in EXACT_LOGITS or (largest is not None and largest <= MOST_LOGITS)
        return same and exact and abs(self.points) <= MOST_POINTS


def see(model: Model, held_out: HeldOut) -> dict[str, Embeddings]:
    """Return the visual tokens of every picture."""
    return {
        name: model.encoder.encode([load_picture(held_out.folder / name)]).tokens_of(0)
        for name in held_out.questions
    }


def hear(
    model: Model,
    held_out: HeldOut,
    seen: dict[str, Embeddings],
    conversations: int,
    along: dict[str, tuple[int, ...]] | None,
) -> Heard:
    """Ask one variant everything.

    Args:
        model: the variant.
        held_out: the questions.
        seen: visual tokens of every picture.
        conversations: how many pictures are talked about in turns.
        along: token ids that logits are taken along, for each picture of a conversation.
    """
    turns, logits = [], []
    for name in list(seen)[:conversations]:
        questions = [fields["question"] for fields in held_out.questions[name]]
        turns += _converse(model, held_out.folder / name, questions[:TURNS])
        if along is not None:
            logits.append(_logits_along(model, seen[name], questions[0], along[name]))
    answers, right = [], []
    for name, tokens in seen.items():
        for fields in held_out.questions[name]:
            turn = Turn("user", fields["question"], images=1)
            answers.append(model.answer([turn], [tokens], _OPTIONS).text.strip())
            right.append(answers[-1] == fields["answer"])
    return Heard(turns, answers, np.array(right), np.concatenate(logits) if logits else None)


def _converse(model: Model, picture: Path, questions: list[str]) -> list[str]:
    conversation = Conversation(model)
    conversation.show(load_picture(picture))
    return [conversation.ask(question, _OPTIONS).text for question in questions]


def first_answers(
    model: Model, held_out: HeldOut, seen: dict[str, Embeddings]
) -> dict[str, tuple[int, ...]]:
    """Return the token ids of the answer to each picture's first question."""
    return {
        name: model.answer(
            [Turn("user", held_out.questions[name][0]["question"], images=1)], [tokens], _OPTIONS
        ).token_ids
        for name, tokens in seen.items()
    }


def _logits_along(model: Model, tokens: Embeddings, question: str, ids: tuple[int, ...]) -> Logits:
    turn = Turn("user", question, images=1)
    context = model.context
    logits = [context.prefill(model.writer.parts([turn], [tokens]))]
    logits += [context.decode(token) for token in ids]
    return np.stack(logits)  # [L, V]


def compare(variant: str, heard: Heard, reference: Heard) -> Row:
    """Return how one variant differs from fp32."""
    count = len(heard.right)
    gained = float((heard.right & ~reference.right).sum())
    lost = float((~heard.right & reference.right).sum())
    share = (gained - lost) / count
    error = 1.96 * float(np.sqrt(max(gained + lost - count * share**2, 0.0))) / count
    largest = None
    if heard.logits is not None and reference.logits is not None:
        largest = float(np.abs(heard.logits - reference.logits).max())
    same = sum(a == b for a, b in zip(heard.answers, reference.answers, strict=True))
    return Row(
        variant=variant,
        same_turns=sum(a == b for a, b in zip(heard.turns, reference.turns, strict=True)),
        turns=len(heard.turns),
        largest_logit_difference=largest,
        accuracy_percent=round(100 * float(heard.right.mean()), 2),
        points=round(100 * share, 2),
        points_interval=(round(100 * (share - error), 2), round(100 * (share + error), 2)),
        same_answers_percent=round(100 * same / count, 2),
    )


@contextmanager
def _built(model: str, tokens: int) -> Iterator[dict[str, Bundle]]:
    """Build a bundle for every variant; backends share one where they can."""
    pairs: tuple[tuple[LlmPrecision, GgufPrecision], ...]
    pairs = (("fp32", "f32"), ("int4", "f16"), ("int8", "q8_0"), ("int4", "q4_k_m"))
    with TemporaryDirectory() as folder:
        bundles: dict[str, Bundle] = {}
        for precision, gguf in pairs:
            print(f"building {precision} and {gguf} ...", file=sys.stderr)
            out = Path(folder) / gguf
            build_bundle(
                BuildOptions(
                    model=model,
                    out=out,
                    tokens=(tokens,),
                    precision="fp32",
                    decoders=DecoderOptions(("ort", "llamacpp"), precision, gguf),
                )
            )
            opened = open_bundle(out)
            names = f"ort {precision}", f"openvino {precision}", f"llamacpp {gguf}"
            bundles |= dict.fromkeys(names, opened)
        yield bundles


def main(
    model: Annotated[str, typer.Option(help="LLaVA checkpoint.")] = "models/pocket-llava",
    data: Annotated[Path, typer.Option(help="Folder of pictures and questions.jsonl.")] = Path(
        "models/pocket-llava/test"
    ),
    pictures: Annotated[
        int | None, typer.Option(help="Ask about this many; left out, all.")
    ] = None,
    conversations: Annotated[int, typer.Option(help="Pictures talked about in three turns.")] = 50,
    tokens: Annotated[int, typer.Option(help="Visual tokens left by VisionZip.")] = 64,
    llm_url: Annotated[
        str | None, typer.Option(help="A vLLM server of the same checkpoint in float32.")
    ] = None,
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Compare what language backends and precisions say; exit code 1: a claim does not hold."""
    held_out = HeldOut.read(data, pictures)
    rows: list[Row] = []
    with _built(model, tokens) as bundles:
        exact = bundles["ort fp32"]
        with open_model(exact, backend="ort", threads=threads) as reference_model:
            seen = see(reference_model, held_out)
            along = first_answers(reference_model, held_out, seen)
            reference = hear(reference_model, held_out, seen, conversations, along)
        for backend, precision in VARIANTS:
            variant = f"{backend} {precision}"
            print(f"asking {variant} ...", file=sys.stderr)
            with open_model(bundles[variant], backend=backend, threads=threads) as asked:
                heard = hear(asked, held_out, seen, conversations, along)
            rows.append(compare(variant, heard, reference))
        if llm_url is not None:
            print("asking vllm ...", file=sys.stderr)
            with open_model(exact, server=ServerOptions(llm_url), threads=threads) as asked:
                heard = hear(asked, held_out, seen, conversations, None)
            rows.append(compare("vllm fp32", heard, reference))
    _tell(rows, len(seen), len(reference.answers), as_json)
    return 0 if all(row.met for row in rows) else 1


def _tell(rows: list[Row], pictures: int, questions: int, as_json: bool) -> None:
    if as_json:
        document = [asdict(row) | {"met": row.met} for row in rows]
        cli.print_json({"pictures": pictures, "questions": questions, "rows": document})
        return
    print(f"{questions} questions about {pictures} pictures")
    print("| decoder | same text in turns | logits differ by | accuracy | points | same answers |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        largest = row.largest_logit_difference
        low, high = row.points_interval
        print(
            f"| {row.variant} | {row.same_turns} of {row.turns} "
            f"| {'' if largest is None else f'{largest:.2g}'} | {row.accuracy_percent:.1f} % "
            f"| {row.points:+.2f} ({low:+.2f} to {high:+.2f}) | {row.same_answers_percent:.1f} % |"
        )


if __name__ == "__main__":
    cli.run(main, ("`python -m benchmarks.language_backends --pictures 20`",))
