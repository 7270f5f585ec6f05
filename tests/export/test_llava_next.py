"""LLaVA-NeXT end to end on a tiny random model: pixels, tokens, answers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from engines.bundle import Bundle, open_bundle
from engines.errors import BundleError, CheckpointError, OptionError
from engines.frame_size import FrameSize
from engines.memory.of_bundle import MemoryOptions, need_of_bundle
from engines.targets import find_target
from export.build import BuildOptions, build_bundle
from export.build.command import main
from export.build.plan import plan_build
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.tune.run import TuneOptions, tune_checkpoint
from export.verify.sides import refuse_other_checkpoint
from runtime.commands.ask import ask, document_from_answer
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import Model, open_model
from runtime.model_options import ModelOptions
from runtime.model_repository.repository import write_repository
from runtime.server.seen_picture import SeenPicture
from runtime.vision import VisionEncoder
from tests.tiny_tiles import (
    SIZES,
    picture_of,
    processed,
    tiny_llava_next,
    tokens_of,
    write_tiled,
    written_by,
)

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiled(tmp_path_factory.mktemp("next") / "tiny-next", tiny_llava_next())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlavaNextForConditionalGeneration:
    return LlavaNextForConditionalGeneration.from_pretrained(checkpoint, dtype="float32").eval()


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One tower with all tokens and with 6 of each square."""
    out = tmp_path_factory.mktemp("bundles") / "next"
    build_bundle(
        BuildOptions(
            str(checkpoint), out, tokens=("all", 6), decoders=DecoderOptions(precision="fp32")
        )
    )
    return open_bundle(out)


@pytest.mark.parametrize("size", SIZES)
def test_all_tokens_are_those_of_transformers_in_their_order(reference, bundle, size) -> None:
    picture = picture_of(*size)
    with VisionEncoder(bundle, threads=1) as encoder:
        pixels = encoder.layout.pixel_values([picture], encoder._bands)
        np.testing.assert_allclose(
            pixels, processed(reference, picture)["pixel_values"][0], atol=1e-5
        )
        seen = encoder.encode([picture])
    expected = tokens_of(reference, picture)
    assert seen.tokens_of(0).shape == expected.shape
    np.testing.assert_allclose(seen.tokens_of(0), expected, atol=1e-4)


def test_a_batch_of_pictures_is_what_each_is_alone(bundle) -> None:
    pictures = [picture_of(30, 60), picture_of(60, 60), picture_of(100, 30)]
    for budget in (16, 6):
        with VisionEncoder(bundle, threads=1, tokens=budget) as encoder:
            together = encoder.encode(pictures).split()
            alone = [encoder.encode([one]) for one in pictures]
        for mine, other in zip(together, alone, strict=True):
            count = int(other.valid[0])
            assert mine.valid.tolist() == [count]
            assert mine.budget == other.budget == budget
            assert other.first(budget) is other
            np.testing.assert_allclose(mine.tokens_of(0), other.tokens_of(0), atol=1e-5)
            np.testing.assert_array_equal(mine.origin[0, :count], other.origin[0])


def test_a_picture_takes_one_call_of_the_engine(bundle) -> None:
    with VisionEncoder(bundle, threads=1) as encoder:
        calls: list[tuple[int, ...]] = []
        run = encoder.session.run
        encoder.session.run = lambda given: calls.append(given["pixel_values"].shape) or run(given)
        encoder.encode([picture_of(60, 60)])
    assert calls == [(5, 3, 28, 28)]


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[Model]:
    with open_model(bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("size", SIZES[:3])
def test_the_greedy_answer_is_that_of_transformers(reference, model, size) -> None:
    picture = picture_of(*size)
    answer = model.ask(picture, QUESTION, GenerationOptions(max_tokens=16))
    ids = model.writer.ids([Turn("user", QUESTION, images=1)]).tolist()
    said = written_by(reference, picture, ids, len(answer.token_ids))
    assert len(answer.token_ids) > 4
    assert said == list(answer.token_ids)


def test_the_manifest_says_how_pictures_are_cut(bundle) -> None:
    tiles = bundle.manifest.tiles
    assert tiles is not None
    assert (tiles.side, tiles.most_squares, tiles.newlines) == (28, 5, "rows")
    assert tiles.most_tokens(16, 4, "none") == 16 * 5 + 8
    assert bundle.manifest.files[tiles.newline].bytes < 1000


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {}), ("qwen2", {}), ("llama", {"vision_feature_layer": [-2, 1]})],
)
def test_other_language_models_and_several_feature_layers(tmp_path, family, changes) -> None:
    model = tiny_llava_next(family, **changes)
    root = write_tiled(tmp_path / "next", model)
    out = tmp_path / "bundle"
    build_bundle(
        BuildOptions(str(root), out, reducer="none", decoders=DecoderOptions(precision="fp32"))
    )
    picture = picture_of(30, 60)
    with open_model(out, threads=1) as opened:
        seen = opened.encoder.encode([picture])
        np.testing.assert_allclose(seen.tokens_of(0), tokens_of(model, picture), atol=1e-4)
        assert opened.ask(picture, QUESTION).token_ids


def test_what_is_not_built_is_refused(checkpoint, tmp_path) -> None:
    options = BuildOptions(
        str(checkpoint), tmp_path / "out", graph_input="uint8", frame=FrameSize(100, 100)
    )
    with pytest.raises(OptionError, match="cuts a picture into tiles"):
        plan_build(options)


def changed(checkpoint: Path, root: Path, file: str, **fields: Any) -> Path:
    root.mkdir()
    for each in checkpoint.iterdir():
        (root / each.name).symlink_to(each)
    content = json.loads((checkpoint / file).read_text()) | fields
    (root / file).unlink()
    (root / file).write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        ("config.json", {"image_grid_pinpoints": [[28, 50]]}, r"config\.json says \[\(28, 50\)\]"),
        (
            "config.json",
            {"vision_feature_select_strategy": "full"},
            "a class token has no place among the rows",
        ),
        ("config.json", {"vision_feature_layer": [-2, -4]}, "the tower has 3 layers"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor"},
            "Expected one of LlavaNextImageProcessor",
        ),
        ("preprocessor_config.json", {"size": {"shortest_edge": 30}}, "scales the whole picture"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path, file, fields, told):
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(changed(checkpoint, tmp_path / "changed", file, **fields))


def test_tiles_that_no_squares_fill_are_refused(checkpoint, tmp_path) -> None:
    pinpoints = {"image_grid_pinpoints": [[28, 50]]}
    root = changed(checkpoint, tmp_path / "one", "config.json", **pinpoints)
    root = changed(root, tmp_path / "two", "preprocessor_config.json", **pinpoints)
    with pytest.raises(CheckpointError, match="28 x 50, expected multiples of 28 pixels"):
        open_checkpoint(root)


def test_a_checkpoint_without_newline_is_refused(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    root = changed(checkpoint, tmp_path / "changed", "config.json")
    state = load_file(checkpoint / "model.safetensors")
    name = next(one for one in state if one.endswith("image_newline"))
    del state[name]
    (root / "model.safetensors").unlink()
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no tensors of the image newline"):
        open_checkpoint(root)


def test_a_bundle_whose_newline_is_another_models_is_refused(bundle, monkeypatch) -> None:
    text = bundle.manifest.text.model_copy(update={"hidden_size": 65})
    manifest = bundle.manifest.model_copy(update={"text": text})
    with pytest.raises(BundleError, match=r"expected image_newline float32\[65\]"):
        VisionEncoder(Bundle(bundle.root, manifest))


def test_ask_answers_draws_and_counts(bundle, tmp_path, capsys) -> None:
    Image.fromarray(picture_of(60, 100)).save(tmp_path / "photo.png")
    answer = ask(
        bundle.root,
        tmp_path / "photo.png",
        QUESTION,
        model=ModelOptions(visual_tokens=6),
        overlay=tmp_path / "kept.png",
        generation=GenerationOptions(max_tokens=3),
    )
    document = document_from_answer(answer, bundle)
    squares = 1 + 4
    assert document["patches"] == squares * 16
    assert document["reducer"] == "visionzip"
    assert squares * 2 < document["visual_tokens"] <= bundle.most_visual_tokens(bundle.vision(6))
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.height > 2 * 460  # both views, one above the other


def test_positions_among_all_tokens_are_refused(bundle) -> None:
    with pytest.raises(OptionError, match=r"--positions original: .* cuts pictures into tiles"):
        open_model(bundle, threads=1, positions="original")


def test_a_clip_is_refused_before_anything_is_loaded(bundle, tmp_path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(picture_of(60, 100)).save(tmp_path / name)
    with pytest.raises(OptionError, match="into up to 5 squares"):
        ask(bundle.root, tmp_path, QUESTION)


def test_the_server_tells_of_both_views(bundle) -> None:
    with VisionEncoder(bundle, threads=1, tokens=6) as encoder:
        visual = encoder.encode([picture_of(60, 100)])
    told = SeenPicture(visual, 100, 60, {}).document(bundle)
    whole, tiles = told["views"]
    assert (whole["patch_rows"], whole["patch_columns"], whole["box"]) == (4, 4, [0, 0, 60, 100])
    assert (tiles["patch_rows"], tiles["patch_columns"]) == (8, 8)
    assert tiles["box"] == [pytest.approx(-19.7, abs=1), 0, pytest.approx(79.7, abs=1), 100]
    assert told["kept"] == tiles["kept"]
    assert len(whole["kept"]) + len(tiles["kept"]) == (visual.origin >= 0).sum()
    assert tiles["kept"] == sorted(tiles["kept"])


def test_memory_counts_every_square(bundle) -> None:
    target = find_target("cpu")
    need = need_of_bundle(bundle, target, MemoryOptions())
    one = bundle.manifest.model_copy(update={"tiles": None})
    less = need_of_bundle(Bundle(bundle.root, one), target, MemoryOptions())
    assert need is not None
    assert less is not None
    assert need.total_bytes > less.total_bytes


@pytest.mark.parametrize("command", ["triton", "verify", "tune"])
def test_commands_that_take_one_square_say_so(bundle, checkpoint, tmp_path, command) -> None:
    with pytest.raises(OptionError, match=r"cuts (a picture|pictures) into tiles"):
        if command == "triton":
            write_repository(bundle, tmp_path / "models")
        elif command == "verify":
            refuse_other_checkpoint(bundle, open_checkpoint(checkpoint))
        else:
            tune_checkpoint(
                TuneOptions(str(checkpoint), tmp_path / "no.json", tmp_path, tmp_path / "tuned")
            )


def test_a_dry_run_says_what_a_picture_becomes(checkpoint, tmp_path, capsys) -> None:
    main(options=BuildOptions(str(checkpoint), tmp_path / "out", tokens=(6,)), dry_run=True)
    told = capsys.readouterr().out
    assert "6 of 16 visual tokens of each square" in told
    assert "a view of it all and up to 4 tiles, at most 38 visual tokens with newlines" in told
