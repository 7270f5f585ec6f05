"""Tuning: what is learned from, what is learned, and what stays as it was."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from engines.cli import make_app
from engines.errors import CheckpointError, OptionError
from export.checkpoint.llava import open_checkpoint
from export.reducers import make_reducer
from export.tune import command as tune
from export.tune.conversations import read_conversations
from export.tune.features import reduce_pictures
from export.tune.run import TuneOptions, tune_checkpoint
from export.tune.student import Lora, Student, make_batch
from export.tune.training import STATE_FILE, Recipe, load_state, train
from export.tune.training_text import group_rows, write_text
from export.tune.tuned_checkpoint import write_tuned_checkpoint
from runtime.language.prompt import PromptWriter
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch
from tests.export import conftest as sharded

COLOURS = ("red", "green", "blue", "white")
RGB = ((200, 20, 20), (20, 180, 20), (20, 20, 200), (240, 240, 240))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of one colour, two conversations about each, in LLaVA's format."""
    root = tmp_path_factory.mktemp("conversations")
    (root / "images").mkdir()
    entries = []
    for number in range(16):
        colour = number % len(COLOURS)
        noise = np.random.default_rng(number).integers(-15, 15, (28, 28, 3))
        pixels = np.clip(np.array(RGB[colour]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        for question, answer in (
            ("colour?", COLOURS[colour]),
            ("Say it.", f"It is {COLOURS[colour]}."),
        ):
            entries.append(
                {
                    "id": len(entries),
                    "image": f"{number}.png",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question}"},
                        {"from": "gpt", "value": answer},
                    ],
                }
            )
    (root / "chat.json").write_text(json.dumps(entries))
    return root


@pytest.fixture(scope="module")
def options(data: Path, language_checkpoint: Path) -> TuneOptions:
    return TuneOptions(
        model=str(language_checkpoint),
        data=data / "chat.json",
        images=data / "images",
        out=data / "unused",
        tokens=6,
        reducer_options={"dominant": 4, "contextual": 2},
        recipe=Recipe(batch=4, steps=30, validate_every=10, learning_rate=3e-2),
        validation=0.25,
        device="cpu",
    )


@pytest.fixture(scope="module")
def tuned(options: TuneOptions) -> Path:
    out = options.data.with_name("projector")
    tune_checkpoint(replace(options, out=out))
    return out


@pytest.fixture(scope="module")
def adapted(options: TuneOptions) -> Path:
    out = options.data.with_name("lora")
    pytest.importorskip("peft", reason="the extra `tuning`")
    tune_checkpoint(replace(options, out=out, lora=Lora(4, 8)))
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    assert {name: one.dtype for name, one in old.items()} == {n: t.dtype for n, t in new.items()}
    return {name for name in old if not torch.equal(old[name], new[name])}


# ------------------------------------------------------------------ what comes out


def test_loss_falls_and_the_record_says_so(tuned: Path) -> None:
    looks = json.loads((tuned / "tuning.json").read_text())["looks"]
    assert [look["step"] for look in looks] == [0, 10, 20, 30]
    assert looks[-1]["loss"] < 0.7 * looks[1]["loss"]
    assert looks[-1]["validation_loss"] < 0.7 * looks[0]["validation_loss"]
    ElementTree.parse(tuned / "tuning.svg")


def test_only_the_projector_changes(language_checkpoint: Path, tuned: Path) -> None:
    names = changed(language_checkpoint, tuned)
    assert names
    assert all("multi_modal_projector" in name for name in names)


def test_adapters_change_the_language_model_and_not_the_tower(
    language_checkpoint: Path, adapted: Path
) -> None:
    names = changed(language_checkpoint, adapted)
    assert any("q_proj" in name for name in names)
    assert not [name for name in names if "vision_tower" in name or "embed" in name]
    assert not [name for name in names if "norm" in name or "lm_head" in name]


@pytest.mark.parametrize("which", ["tuned", "adapted"])
def test_export_and_transformers_open_what_was_written(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    projector = open_checkpoint(folder).projector()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs = model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(theirs[name], one) for name, one in projector.state_dict().items())


def test_merged_adapters_answer_as_they_did_beside_the_weights(
    options: TuneOptions, adapted: Path
) -> None:
    checkpoint = open_checkpoint(options.model)
    student = Student(checkpoint, Lora(4, 8))
    work = adapted.with_name("lora.tuning")
    optimizer = torch.optim.AdamW(student.tuned.values())
    assert load_state(work / STATE_FILE, student.tuned, optimizer) == 30
    ids = torch.arange(5, 40)[None]
    plain = checkpoint.language_model(torch.float32)(ids).logits
    beside = student.llm(ids).logits
    merged = open_checkpoint(adapted).language_model(torch.float32)(ids).logits
    assert (beside - plain).abs().max() > 0.1
    assert (beside - merged).abs().max() < 0.1 * (beside - plain).abs().max()


# ------------------------------------------------------------------ how it learns


def prepared(options: TuneOptions, work: Path, reducer: Any = None) -> tuple[Any, Any, Any]:
    """Return checkpoint, rows and pictures of the data set."""
    checkpoint = open_checkpoint(options.model)
    entries = json.loads(options.data.read_text())
    names = sorted({entry["image"] for entry in entries})
    reducer = reducer or make_reducer("visionzip", dominant=4, contextual=2)
    pictures = reduce_pictures(
        checkpoint, reducer, options.images, names, work, lambda items, line: items
    )
    writer = PromptWriter.from_prompt(
        checkpoint.prompt("tokenizer.json"), checkpoint.root / "tokenizer.json"
    )
    read = read_conversations(options.data, options.images).conversations
    rows = group_rows([(one.image, write_text(writer, one)) for one in read], 200)
    return checkpoint, rows, pictures


def test_packed_loss_is_that_of_transformers(options: TuneOptions, tmp_path: Path) -> None:
    checkpoint, rows, pictures = prepared(options, tmp_path, make_reducer("none"))
    score = Student(checkpoint, None).score(make_batch(rows[:3], pictures))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.root, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows[:3]:
        assert len(row.texts) == 2
        pixels = preprocess_batch(
            [load_picture(options.images / row.image)], checkpoint.preprocessing
        )
        for text in row.texts:
            image = [checkpoint.config.image_token_id] * 16
            ids = torch.tensor([[*text.before, *image, *text.ids, 0]])
            targets = [-100] * (len(text.before) + 16) + [-100, *text.targets]
            with torch.no_grad():
                loss = model(
                    input_ids=ids,
                    pixel_values=torch.from_numpy(pixels),
                    labels=torch.tensor([targets]),
                ).loss
            mine = sum(target != -100 for target in text.targets)
            total, count = total + float(loss) * mine, count + mine
    assert score.targets == count
    assert score.answers == 6
    assert float(score.loss_sum.detach()) == pytest.approx(total, rel=1e-4)


def test_padding_is_not_seen(options: TuneOptions, tmp_path: Path) -> None:
    checkpoint, rows, pictures = prepared(options, tmp_path)
    student = Student(checkpoint, None)
    batch = make_batch(rows[:4], pictures)
    short = replace(batch, valid=torch.full((4,), 3), visual=batch.visual[:, :3])
    noisy = batch.visual.clone()
    noisy[:, 3:] = 100.0
    padded = replace(batch, valid=torch.full((4,), 3), visual=noisy)
    with torch.no_grad():
        losses = [float(student.score(one).loss_sum) for one in (short, padded, batch)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_a_run_that_was_cut_short_ends_with_the_same_bits(
    options: TuneOptions, tmp_path: Path
) -> None:
    checkpoint, rows, pictures = prepared(options, tmp_path)
    recipe = Recipe(batch=2, accumulate=2, steps=9, validate_every=3)
    whole, part, rest = (Student(checkpoint, None) for _ in range(3))
    log = train(whole, rows[4:], rows[:4], pictures, recipe, tmp_path / "whole")
    train(part, rows[4:], rows[:4], pictures, recipe, tmp_path / "cut", stop_after=5)
    again = train(rest, rows[4:], rows[:4], pictures, recipe, tmp_path / "cut")
    assert again.looks == log.looks
    for name, one in whole.tuned.items():
        assert torch.equal(one, rest.tuned[name])
    assert not torch.equal(
        whole.tuned["projector.linear_1.weight"], part.tuned["projector.linear_1.weight"]
    )


def test_accumulation_is_one_larger_batch(options: TuneOptions, tmp_path: Path) -> None:
    checkpoint, rows, pictures = prepared(options, tmp_path)
    students = [Student(checkpoint, None) for _ in range(2)]
    for student, batch, accumulate in zip(students, (4, 2), (1, 2), strict=True):
        recipe = Recipe(batch=batch, accumulate=accumulate, steps=3, validate_every=3)
        train(student, rows[4:], rows[:4], pictures, recipe, tmp_path / str(batch))
    for name, one in students[0].tuned.items():
        torch.testing.assert_close(one, students[1].tuned[name], rtol=1e-3, atol=1e-5)


def test_features_are_computed_once(
    options: TuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, first = prepared(options, tmp_path)
    monkeypatch.setattr("export.tune.features.load_picture", None)  # a call would fail
    _, _, again = prepared(options, tmp_path)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    with pytest.raises(TypeError):
        prepared(options, tmp_path, make_reducer("visionzip", dominant=5, contextual=1))


def test_bf16_learns_too(options: TuneOptions, tmp_path: Path) -> None:
    checkpoint, rows, pictures = prepared(options, tmp_path)
    student = Student(checkpoint, None, "bf16")
    assert student.llm.dtype == torch.bfloat16
    recipe = Recipe(batch=4, steps=6, validate_every=6, learning_rate=5e-3)
    log = train(student, rows[4:], rows[:4], pictures, recipe, tmp_path / "bf16")
    assert student.projector.linear_1.weight.dtype == torch.float32
    assert log.looks[-1].validation_loss < log.looks[0].validation_loss


def test_a_loss_that_is_no_number_stops_with_its_step(options: TuneOptions, tmp_path: Path) -> None:
    checkpoint, rows, pictures = prepared(options, tmp_path)
    recipe = Recipe(batch=4, steps=6, validate_every=2, learning_rate=1e30)
    with pytest.raises(OptionError, match=r"loss of step \d is (nan|inf).*--learning-rate"):
        train(Student(checkpoint, None), rows[4:], rows[:4], pictures, recipe, tmp_path / "nan")


# ------------------------------------------------------------------ what is refused


def test_another_run_in_the_same_place_is_refused(options: TuneOptions, tuned: Path) -> None:
    other = replace(options, out=tuned, overwrite=True, lora=Lora(2, 4))
    with pytest.raises(OptionError, match=r"run with other options \(lora\).*--fresh"):
        tune_checkpoint(other)
    with pytest.raises(OptionError, match="--overwrite"):
        tune_checkpoint(replace(options, out=tuned))
    with pytest.raises(OptionError, match="was not tuned by this command"):
        tune_checkpoint(replace(options, out=options.images, overwrite=True))


def test_too_few_pictures_for_a_step(options: TuneOptions, tmp_path: Path) -> None:
    recipe = replace(options.recipe, batch=13)
    with pytest.raises(OptionError, match=r"12 pictures are left to learn from.*13.*--batch"):
        tune_checkpoint(replace(options, out=tmp_path / "x", recipe=recipe))


def test_unreadable_pictures_are_counted_and_then_too_many(
    options: TuneOptions, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for file in options.images.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    (images / "3.png").write_bytes(b"not a picture")
    mine = replace(options, images=images, out=tmp_path / "one")
    report = tune_checkpoint(mine)
    assert report.left_out == {"picture_unreadable": 2}
    assert report.pictures == 15
    (images / "4.png").write_bytes(b"nor this")
    with pytest.raises(OptionError, match=r"4 of 32 conversations have a picture that cannot be"):
        tune_checkpoint(replace(mine, out=tmp_path / "two"))


def test_answers_longer_than_the_context_are_refused(options: TuneOptions, tmp_path: Path) -> None:
    entries = json.loads(options.data.read_text())
    for entry in entries[::4]:
        entry["conversations"][1]["value"] = "far too long " * 400
    data = tmp_path / "long.json"
    data.write_text(json.dumps(entries))
    mine = replace(options, data=data, out=tmp_path / "out")
    with pytest.raises(OptionError, match=r"8 of 32 conversations have a first answer .* 1018 pos"):
        tune_checkpoint(mine)
    assert not mine.out.exists()


def test_a_weight_that_leaves_its_dtype_is_refused(options: TuneOptions, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(options.model)
    student = Student(checkpoint, None)
    student.projector.linear_1.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"no longer fits torch\.float16"):
        write_tuned_checkpoint(checkpoint, student, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_in_shards_keeps_them(tmp_path: Path) -> None:
    root = sharded.write_checkpoint(tmp_path / "old", sharded.tiny_llava(), shards=3)
    student = Student(open_checkpoint(root), None)
    student.projector.linear_1.bias.data += 1
    write_tuned_checkpoint(open_checkpoint(root), student, tmp_path / "new", {"note": "hello"})
    files = sorted(root.glob("*.safetensors"))
    same = [one.read_bytes() == (tmp_path / "new" / one.name).read_bytes() for one in files]
    assert same.count(False) == 1
    again = open_checkpoint(tmp_path / "new").projector().linear_1.bias
    assert torch.equal(again, student.projector.linear_1.bias)
    assert (tmp_path / "new" / "note").read_text() == "hello"


def test_the_command(options: TuneOptions, tmp_path: Path) -> None:
    line = [
        "--model", options.model, "--data", str(options.data), "--images", str(options.images),
        "--tokens", "6", "--batch", "4", "--steps", "2", "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(make_app(tune.main), line)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    assert report["looks"][-1]["step"] == 2
    again = CliRunner().invoke(make_app(tune.main), [*line, "--precision", "fp8"])
    assert again.exit_code == 2
    assert "fp32, bf16" in again.stderr
