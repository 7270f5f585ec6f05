"""LLaVA-OneVision end to end on a tiny random model: pixels, tokens, answers, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration

from engines.bundle import Bundle, open_bundle
from engines.errors import CheckpointError
from export.build import BuildOptions, build_bundle
from export.build.command import main
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from runtime.commands.ask import ask, document_from_answer
from runtime.conversation import Conversation
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import Model, open_model
from runtime.model_options import ModelOptions
from runtime.vision import VisionEncoder
from runtime.vision.layouts import views_of
from tests.tiny_tiles import (
    image_processor,
    picture_of,
    processed,
    tiny_llava_onevision,
    tokens_of,
    write_tiled,
    written_by,
)

QUESTION = "What is in the picture?"
SHORT = GenerationOptions(max_tokens=6)
PATCHES = 16
WHOLE = ((28, 28), (30, 60), (61, 29), (60, 60), (100, 30), (84, 84), (45, 100), (60, 200))
SCALED = ((112, 112), (84, 112), (112, 84), (109, 100), (98, 112), (300, 280), (700, 800))
"""Of 16 or 12 tiles, with and without padding: beyond 9."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiled(tmp_path_factory.mktemp("onevision") / "tiny", tiny_llava_onevision())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlavaOnevisionForConditionalGeneration:
    loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    return loaded.eval()


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One tower with all tokens and with 6 of each square."""
    out = tmp_path_factory.mktemp("bundles") / "onevision"
    build_bundle(
        BuildOptions(
            str(checkpoint), out, tokens=("all", 6), decoders=DecoderOptions(precision="fp32")
        )
    )
    return open_bundle(out)


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[Model]:
    with open_model(bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("size", [*WHOLE, *SCALED])
def test_all_tokens_are_those_of_transformers_in_their_order(reference, model, size) -> None:
    picture, encoder = picture_of(*size), model.encoder
    pixels = encoder.layout.pixel_values([picture], encoder._bands)
    given = processed(reference, picture)
    np.testing.assert_allclose(pixels, given["pixel_values"][0], atol=1e-5)
    seen, expected = encoder.encode([picture]), tokens_of(reference, picture)
    assert seen.tokens_of(0).shape == expected.shape
    np.testing.assert_allclose(seen.tokens_of(0), expected, atol=1e-4)
    scaled = (seen.origin[0, PATCHES:] < 0).all()
    assert scaled == (size in SCALED)
    assert len(expected) <= encoder.bundle.most_visual_tokens(encoder.graph)


def test_a_scaled_token_says_which_patches_lie_in_it(model) -> None:
    """12 by 16 patches become 10 by 13 tokens with a newline after each row."""
    seen = model.encoder.encode([picture_of(84, 112)])
    assert seen.valid.tolist() == [PATCHES + 10 * 14]
    _, tiles = model.encoder.layout.views((84, 112))
    slots = -seen.assignment[0][tiles.patches] - 2 - PATCHES  # int64[12, 16]
    assert (seen.assignment[0][:PATCHES] == np.arange(PATCHES)).all()
    for row in range(12):
        for column in range(16):
            in_row, in_column = divmod(slots[row, column], 14)
            assert in_row <= (row + 0.5) * 10 / 12 < in_row + 1
            assert in_column <= (column + 0.5) * 13 / 16 < in_column + 1
    assert len(np.unique(slots)) == 10 * 13


@pytest.mark.parametrize("size", [(30, 60), (84, 112)])
def test_the_greedy_answer_is_that_of_transformers(reference, model, size) -> None:
    picture = picture_of(*size)
    answer = model.ask(picture, QUESTION, GenerationOptions(max_tokens=16))
    ids = model.writer.ids([Turn("user", QUESTION, images=1)]).tolist()
    assert len(answer.token_ids) > 4
    assert written_by(reference, picture, ids, 16) == list(answer.token_ids)


def test_a_reducer_bounds_each_square_and_nothing_is_scaled(bundle) -> None:
    with VisionEncoder(bundle, threads=1, tokens=6) as encoder:
        seen = encoder.encode([picture_of(112, 112)])
    squares = 1 + 16
    kept = int((seen.origin[0] >= 0).sum())
    assert kept > squares  # tokens that stand for a patch, which no scaled one does
    newlines = int(seen.valid[0]) - squares * 6
    assert 0 < newlines <= 16
    assert int(seen.valid[0]) <= bundle.most_visual_tokens(bundle.vision(6))


def test_ask_answers_draws_and_counts(checkpoint, tmp_path) -> None:
    out = tmp_path / "scope"
    build_bundle(
        BuildOptions(
            str(checkpoint),
            out,
            reducer="scope",
            reducer_options={"alpha": 0.0},
            tokens=(6,),
            decoders=DecoderOptions(precision="fp32"),
        )
    )
    Image.fromarray(picture_of(100, 110)).save(tmp_path / "photo.png")
    answer = ask(
        out,
        tmp_path / "photo.png",
        QUESTION,
        model=ModelOptions(visual_tokens=6),
        overlay=tmp_path / "kept.png",
        generation=GenerationOptions(max_tokens=3),
    )
    bundle = open_bundle(out)
    document = document_from_answer(answer, bundle)
    assert document["reducer"] == "scope"
    assert document["patches"] == 17 * PATCHES
    assert 17 * 2 < document["visual_tokens"] <= bundle.most_visual_tokens(bundle.vision())
    assert (tmp_path / "kept.png").stat().st_size


def test_the_manifest_says_from_where_on_tokens_are_scaled(bundle) -> None:
    tiles = bundle.manifest.tiles
    assert tiles is not None
    assert (tiles.side, tiles.most_squares, tiles.most_tiles) == (28, 17, 9)


def test_a_dry_run_counts_scaled_tokens(checkpoint, tmp_path, capsys) -> None:
    main(options=BuildOptions(str(checkpoint), tmp_path / "out", reducer="none"), dry_run=True)
    assert "up to 16 tiles, at most 207 visual tokens with newlines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vision_aspect_ratio": "anyres"}, "anyres_max_ and a number of tiles"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "anyres_max_ and a number of tiles"),
        ({"vision_feature_select_strategy": "default"}, "tower has no class token"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path, fields, told) -> None:
    root = tmp_path / "changed"
    root.mkdir()
    for each in checkpoint.iterdir():
        (root / each.name).symlink_to(each)
    content: dict[str, Any] = json.loads((checkpoint / "config.json").read_text()) | fields
    (root / "config.json").unlink()
    (root / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(root)


PAIR = ((60, 100), (84, 112))


def pair_given() -> Any:
    """What transformers' image processor makes of two pictures of one conversation."""
    pictures = [Image.fromarray(picture_of(*size)) for size in PAIR]
    return image_processor("llava_onevision")(images=[pictures], return_tensors="pt")


@torch.no_grad()
def test_each_of_several_pictures_is_one_square_as_in_transformers(reference, bundle) -> None:
    given = pair_given()
    expected = reference.model.get_image_features(
        given["pixel_values"], given["image_sizes"], batch_num_images=given["batch_num_images"]
    ).pooler_output
    pictures = [picture_of(*size) for size in PAIR]
    with VisionEncoder(bundle, threads=1) as encoder:
        pixels = encoder.layout_of("among_others").pixel_values(pictures, encoder._bands)
        seen = encoder.encode(pictures, "among_others")
    np.testing.assert_allclose(pixels, given["pixel_values"][:, 0], atol=1e-5)
    for at, tokens in enumerate(expected):
        assert tokens.shape == (PATCHES + 1, 64)
        np.testing.assert_allclose(seen.tokens_of(at), tokens, atol=1e-4)


@torch.no_grad()
def test_a_conversation_about_several_pictures_is_that_of_transformers(reference, model) -> None:
    """Two in one turn; or the second one later: then the first is looked at again."""
    conversation = Conversation(model)
    for size in PAIR:
        conversation.show(picture_of(*size))
    answer = conversation.ask(QUESTION, SHORT)
    assert [one.shown for one in answer.seen] == ["among_others"] * 2
    assert answer.visual_tokens == 2 * (PATCHES + 1)
    expected = written_about_pair(reference, model, [Turn("user", QUESTION, images=2)])
    assert list(answer.token_ids) == expected
    conversation = Conversation(model)
    alone = conversation.show(picture_of(*PAIR[0]))
    first = conversation.ask(QUESTION, SHORT)
    assert first.visual_tokens == int(alone.valid[0]) > PATCHES + 1
    conversation.show(picture_of(*PAIR[1]))
    second = conversation.ask("And here?", SHORT)
    turns = [
        Turn("user", QUESTION, images=1),
        Turn("assistant", first.text),
        Turn("user", "And here?", images=1),
    ]
    assert list(second.token_ids) == written_about_pair(reference, model, turns)
    assert [len(image.tokens) for image in conversation.images] == [PATCHES + 1] * 2


def written_about_pair(reference: Any, model: Model, turns: list[Turn]) -> list[int]:
    """What transformers writes greedily about the two pictures."""
    image = model.writer.image_token_id
    ids: list[int] = []
    for one in model.writer.ids(turns).tolist():
        ids += [image] * (PATCHES + 1) if one == image else [one]
    given = pair_given()
    written = reference.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=given["pixel_values"],
        image_sizes=given["image_sizes"],
        batch_num_images=given["batch_num_images"],
        max_new_tokens=6,
        do_sample=False,
    )
    return [one for one in written[0, len(ids) :].tolist() if one != 2]


def test_a_new_frame_in_the_place_of_the_only_picture_is_cut_into_tiles(model) -> None:
    conversation = Conversation(model)
    conversation.show(picture_of(*PAIR[0]))
    assert conversation.replace_image(picture_of(*PAIR[1])).shown == "alone"
    conversation.show(picture_of(*PAIR[0]))
    assert conversation.replace_image(picture_of(*PAIR[1])).shown == "among_others"


def test_patches_of_a_padded_square_lie_over_the_picture(bundle) -> None:
    """60 rows in a square of 100: 20 rows of padding above, and below."""
    (view,) = views_of(bundle, bundle.vision(), (60, 100), "among_others")
    np.testing.assert_allclose(view.rows, [-20, 5, 30, 55, 80])
    np.testing.assert_allclose(view.columns, [0, 25, 50, 75, 100])
