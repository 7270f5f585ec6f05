"""The bundled checkpoint, asked through the runtime, against transformers' own generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from engines.bundle import open_bundle
from export.build import build_bundle
from export.build.plan import BuildOptions
from export.language.language_models import DecoderOptions
from runtime.camera.answering import FrameAnswerer, FrameEncoder
from runtime.camera.loop import CameraLoop, CameraOptions
from runtime.camera.scene_change import StillnessOptions
from runtime.language.generate import GenerationOptions
from runtime.model import Model, open_model
from runtime.vision.pictures import load_picture
from tests.runtime.camera.doubles import source_of

POCKET = Path(__file__).parents[2] / "models" / "pocket-llava"
PICTURES = 50

pytestmark = pytest.mark.skipif(
    not (POCKET / "model.safetensors").is_file(), reason="models/pocket-llava is not here"
)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    out = tmp_path_factory.mktemp("pocket") / "bundle"
    build_bundle(
        BuildOptions(
            model=str(POCKET),
            out=out,
            reducer="none",
            tokens=("all",),
            decoders=DecoderOptions(precision="fp32"),
        )
    )
    with open_model(open_bundle(out)) as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(POCKET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(POCKET, use_fast=False)


def questions() -> list[tuple[Path, str]]:
    """One question about each held-out picture, of as many kinds as there are."""
    lines = (POCKET / "test" / "questions.jsonl").read_text("utf-8").splitlines()
    asked: dict[str, list[str]] = {}
    for line in lines:
        fields = json.loads(line)
        asked.setdefault(fields["image"], []).append(fields["question"])
    return [
        (POCKET / "test" / image, texts[number % len(texts)])
        for number, (image, texts) in enumerate(sorted(asked.items())[:PICTURES])
    ]


def test_answers_equal_transformers_on_held_out_pictures(
    pocket: Model, reference: LlavaForConditionalGeneration, processor: Any
) -> None:
    """Reducer `none`, fp32: nothing is left out, so nothing may differ."""
    asked = questions()
    assert len(asked) == PICTURES
    different = []
    for file, question in asked:
        pixels = load_picture(file)
        ours = pocket.ask(pixels, question, GenerationOptions(max_tokens=24)).text
        inputs = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": pixels},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            generated = reference.generate(**inputs, max_new_tokens=24, do_sample=False)
        theirs = processor.decode(
            generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        if ours != theirs:
            different.append(f"{file.name} {question!r}: {ours!r}, transformers {theirs!r}")
    assert not different, "\n".join(different)


def test_openvino_writes_what_onnx_runtime_writes(pocket: Model) -> None:
    pytest.importorskip("openvino")
    short = GenerationOptions(max_tokens=24)
    with open_model(pocket.bundle, backend="openvino", threads=1) as other:
        for file, question in questions():
            pixels = load_picture(file)
            ours, theirs = (model.ask(pixels, question, short) for model in (other, pocket))
            assert ours.text == theirs.text, f"{file.name} {question!r}"
            assert (ours.backend, theirs.backend) == ("openvino", "ort")


def test_answers_of_a_still_scene_are_those_of_a_fresh_look(pocket: Model) -> None:
    """Sensor noise does not change what is said: keeping the tokens says the same for nothing."""
    rng = np.random.default_rng(0)
    camera = CameraOptions(
        "?", every_frame=True, stillness=StillnessOptions(learn_s=0.0, refresh_s=600.0)
    )
    for file, question in questions()[:6]:
        scene = load_picture(file).astype(np.float64)
        frames = [np.clip(scene + rng.normal(0, 3, scene.shape), 0, 255) for _ in range(3)]
        answers = {}
        for reuse in (True, False):
            source = source_of((frame.astype(np.uint8) for frame in frames), live=False)
            loop = CameraLoop(
                [source],
                FrameEncoder(pocket.encoder),
                FrameAnswerer(pocket, GenerationOptions(max_tokens=16)),
                replace(camera, question=question, reuse=reuse),
            )
            answers[reuse] = list(loop.answers())
        assert [answer.reused for answer in answers[True]] == [False, True, True]
        assert [answer.answer.text for answer in answers[True]] == [
            answer.answer.text for answer in answers[False]
        ]
