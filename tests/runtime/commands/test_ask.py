"""Asking: the function, the command, what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle
from runtime.camera.answering import FrameAnswerer, FrameEncoder
from runtime.commands.ask import ask
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import open_model
from runtime.model_options import ModelOptions

QUESTION = "What is in the picture?"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.ask", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )


def test_answer_equals_transformers_given_the_same_visual_tokens(
    language_bundle: Bundle, language_reference: LlavaForConditionalGeneration, photo: Path
) -> None:
    answer = ask(
        language_bundle.root,
        photo,
        QUESTION,
        model=ModelOptions(threads=1),
        generation=GenerationOptions(max_tokens=30),
    )
    with open_model(language_bundle, threads=1) as model:
        ids = model.writer.ids([Turn("user", QUESTION, images=1)])
        backend = model.context.backend
        place = int(np.flatnonzero(ids == model.writer.image_token_id)[0])
        rows = np.concatenate(
            [
                backend.embed(ids[:place]),
                answer.seen[0].tokens_of(0),
                backend.embed(ids[place + 1 :]),
            ]
        )
    generated = language_reference.generate(
        inputs_embeds=torch.from_numpy(rows[None]), max_new_tokens=30, do_sample=False
    )[0]
    assert list(answer.token_ids) == [token for token in generated.tolist() if token != 2]
    assert answer.visual_tokens == 16
    assert answer.prompt_tokens == len(ids) + 15
    assert set(answer.milliseconds) == {
        "load",
        "preprocess",
        "encode",
        "prefill",
        "decode",
        "total",
    }
    assert answer.milliseconds["total"] >= answer.milliseconds["load"]


def test_a_frame_is_answered_as_a_picture_is(language_bundle: Bundle, photo: Path) -> None:
    """The camera loop and `Model.ask` share one path: the same prompt, answer and stages."""
    image = np.asarray(Image.open(photo))
    short = GenerationOptions(max_tokens=8)
    with open_model(language_bundle, threads=1) as model:
        asked = model.ask(image, QUESTION, short)
        (visual,) = FrameEncoder(model.encoder).encode([image])
        prefilled: list[bool] = []
        framed = FrameAnswerer(model, short).answer(
            visual, QUESTION, lambda: prefilled.append(True), lambda: False
        )
        stopped = FrameAnswerer(model, short).answer(visual, QUESTION, lambda: None, lambda: True)
    assert (framed.text, framed.token_ids) == (asked.text, asked.token_ids)
    assert framed.prompt_tokens == asked.prompt_tokens
    assert framed.milliseconds.keys() == asked.milliseconds.keys()
    assert framed.visual_tokens == asked.visual_tokens
    assert prefilled == [True]
    assert stopped.finish == "interrupted"
    assert asked.text.startswith(stopped.text)


def test_a_second_question_computes_its_own_tokens_only(
    language_bundle: Bundle, photo: Path
) -> None:
    picture = np.asarray(Image.open(photo))
    short = GenerationOptions(max_tokens=3)
    with open_model(language_bundle, threads=1) as model:
        first = model.ask(picture, QUESTION, short)
        again = model.ask(picture, "How many chairs?", short)
        ids = model.writer.ids([Turn("user", "How many chairs?", images=1)])
        place = ids.tolist().index(model.writer.image_token_id)
        moved = model.ask(255 - picture, QUESTION, short)
    assert first.reused_tokens == 0
    assert again.reused_tokens >= place + 16
    assert moved.reused_tokens == place


def test_json_is_one_object(language_bundle: Bundle, photo: Path) -> None:
    done = command(
        language_bundle.root, photo, QUESTION, "--json", "--threads", 1, "--max-tokens", 4
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert document["visual_tokens"] == document["patches"] == 16
    assert document["answer_tokens"] <= 4
    assert document["backend"] == "ort"
    assert document["finish"] in {"max_tokens", "stop_token"}
    assert set(document["milliseconds"]) == {
        "load",
        "preprocess",
        "encode",
        "prefill",
        "decode",
        "total",
    }
    assert {"foveate", "numpy", "onnxruntime", "python", "tokenizers"} == set(document["versions"])
    assert done.stderr == ""


def test_text_goes_to_stdout_and_times_to_stderr(language_bundle: Bundle, photo: Path) -> None:
    expected = ask(
        language_bundle.root,
        photo,
        QUESTION,
        model=ModelOptions(threads=1),
        generation=GenerationOptions(max_tokens=6),
    )
    done = command(language_bundle.root, photo, QUESTION, "--threads", 1, "--max-tokens", 6)
    assert done.returncode == 0
    assert done.stdout == expected.text + "\n"
    assert "16 visual tokens" in done.stderr
    assert "prefill" in done.stderr


def test_overlay_is_written(language_bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    ask(
        language_bundle.root,
        photo,
        QUESTION,
        model=ModelOptions(threads=1),
        overlay=tmp_path / "kept.png",
        generation=GenerationOptions(max_tokens=1),
    )
    with Image.open(tmp_path / "kept.png") as overlay:
        assert overlay.width > overlay.height > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.png", QUESTION), "missing.png does not exist"),
        (("PHOTO", QUESTION, "--backend", "abacus"), "abacus"),
        (("PHOTO", QUESTION, "--visual-tokens", "9"), "no vision graph with 9 visual tokens"),
        (("PHOTO", QUESTION, "--temperature", "-1"), "temperature is -1"),
        (("PHOTO", QUESTION * 100), "the context holds 1024"),
        (("PHOTO", QUESTION, "--context-length", "30"), "the context holds 30"),
        (("PHOTO", QUESTION, "--context", "30"), "the context holds 30"),
        (("PHOTO", QUESTION, "--llm-device", "cuda"), "cannot run on CUDAExecutionProvider"),
        (("PHOTO", QUESTION, "--kv-cache", "q8"), "Use --backend llamacpp"),
    ],
)
def test_mistakes_are_told_in_a_paragraph(
    language_bundle: Bundle, photo: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [photo if argument == "PHOTO" else argument for argument in arguments]
    done = command(language_bundle.root, *given)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_teaches() -> None:
    done = command("--help")
    assert done.returncode == 0
    for part in ("Ask a bundle a question", "--overlay", "--max-tokens", "python -m runtime.ask"):
        assert part in done.stdout


def test_importing_it_is_light() -> None:
    """Heavy packages are imported when they are used: `--help` must come at once."""
    heavy = ("onnxruntime", "jinja2", "tokenizers", "rich", "torch", "transformers", "PIL")
    found = f"print([n for n in {heavy} if n in sys.modules])"
    code = f"import sys; from runtime import ask, watch; {found}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
