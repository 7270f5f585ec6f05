"""One budget over the squares of a picture, from the checkpoint to the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engines.bundle import Bundle, open_bundle
from engines.errors import OptionError
from engines.inspect import describe_bundle
from export.build import BuildOptions, build_bundle
from export.build.command import main
from export.build.plan import plan_build
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.reducers import make_reducer
from export.vision.vision_module import build_vision_module
from runtime.commands.ask import ask, document_from_answer
from runtime.language.generate import GenerationOptions
from runtime.vision import VisionEncoder
from tests.tiny_tiles import SIZES, picture_of, tiny_llava_next, write_tiled

TOTAL, OF_A_SQUARE, PATCHES = 13, 6, 16
ONLY = DecoderOptions(precision="fp32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiled(tmp_path_factory.mktemp("next") / "tiny-next", tiny_llava_next())


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "shared"
    options = BuildOptions(
        str(checkpoint),
        out,
        reducer="scope",
        tokens=(OF_A_SQUARE,),
        picture_tokens=TOTAL,
        newlines="none",
        decoders=ONLY,
    )
    build_bundle(options)
    return open_bundle(out)


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_are_those_that_pytorch_thinks_worth_most(checkpoint, bundle, size) -> None:
    picture = picture_of(*size)
    reducer = make_reducer("scope", budget=OF_A_SQUARE)
    module = build_vision_module(open_checkpoint(str(checkpoint)), reducer, tells_worth=True)
    with VisionEncoder(bundle, threads=1) as encoder:
        pixels = encoder.layout.pixel_values([picture], encoder._bands)
        got = encoder.session.run({"pixel_values": pixels})
        seen = encoder.encode([picture])
        places = encoder.layout._patches(size).places()
    with torch.no_grad():
        outputs = module(torch.from_numpy(pixels))
    wanted = {name: one.numpy() for name, one in zip(module.outputs, outputs, strict=True)}
    assert list(wanted) == list(got)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)
    left = []
    for square, slot in np.ndindex(*wanted["token_worth"].shape):
        patch = wanted["patch_index"][square, slot]
        if square == 0 or places[(square - 1) * PATCHES + patch] >= 0:
            left.append((-wanted["token_worth"][square, slot], square * PATCHES + patch))
    stay = {patch for _, patch in sorted(left)[:TOTAL]}
    assert len(stay) == min(TOTAL, len(left)) == seen.valid[0]
    assert set(seen.origin[0].tolist()) == stay
    squares = wanted["visual_tokens"]
    for token, patch in zip(seen.tokens_of(0), seen.origin[0], strict=True):
        square, own = divmod(int(patch), PATCHES)
        slot = wanted["patch_index"][square].tolist().index(own)
        np.testing.assert_allclose(token, squares[square, slot], atol=1e-4)


def test_pictures_of_a_batch_share_nothing(bundle) -> None:
    pictures = [picture_of(30, 60), picture_of(60, 60), picture_of(100, 30)]
    with VisionEncoder(bundle, threads=1) as encoder:
        together = encoder.encode(pictures).split()
        alone = [encoder.encode([one]) for one in pictures]
    for mine, other in zip(together, alone, strict=True):
        assert mine.valid.tolist() == other.valid.tolist() == [TOTAL]
        assert mine.budget == OF_A_SQUARE
        np.testing.assert_array_equal(mine.origin[0, :TOTAL], other.origin[0])
        np.testing.assert_allclose(mine.tokens_of(0), other.tokens_of(0), atol=1e-5)


def test_it_answers_and_draws_what_is_left(bundle, tmp_path) -> None:
    Image.fromarray(picture_of(60, 100)).save(tmp_path / "photo.png")
    answer = ask(
        bundle.root,
        tmp_path / "photo.png",
        "What is in the picture?",
        overlay=tmp_path / "kept.png",
        generation=GenerationOptions(max_tokens=3),
    )
    assert document_from_answer(answer, bundle)["visual_tokens"] == TOTAL
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.height > 0


def test_the_bundle_says_what_its_squares_share(bundle) -> None:
    tiles = bundle.manifest.tiles
    assert tiles is not None
    assert tiles.picture_tokens == TOTAL
    assert bundle.most_visual_tokens(bundle.vision()) == TOTAL + 3 * 4  # three tiles have 12 rows
    outputs = {spec.name: (spec.dtype, spec.shape[1:]) for spec in bundle.vision().outputs}
    assert outputs["token_worth"] == ("float32", (OF_A_SQUARE,))
    assert bundle.vision().accuracy is None
    assert describe_bundle(bundle)["tiles"]["picture_tokens"] == TOTAL


def test_a_dry_run_says_what_is_shared(checkpoint, tmp_path, capsys) -> None:
    options: dict[str, Any] = {"reducer": "divprune", "tokens": (6,), "picture_tokens": 13}
    main(options=BuildOptions(str(checkpoint), tmp_path / "out", **options), dry_run=True)
    told = capsys.readouterr().out
    assert "6 of 16 visual tokens of each square" in told
    assert "up to 4 tiles, 13 shared by content, at most 25 visual tokens with newlines" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reducer": "visionzip"}, "reducer visionzip does not say what a token is worth"),
        ({"reducer": "random"}, "Use --reducer with one of divprune, scope, top_attention"),
        ({"reducer": "none", "tokens": None}, "reducer none does not say"),
        ({"tokens": ("all", 6)}, "reducer none does not say"),
        ({"tokens": (6, 4)}, "--picture-tokens 13 with --tokens 6,4: one budget is shared"),
        ({"picture_tokens": 0}, "5 squares leave 30 tokens at most. Ask for 6 to 30"),
        ({"picture_tokens": 5}, "Ask for 6 to 30"),
        ({"picture_tokens": 31}, "Ask for 6 to 30"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(checkpoint, tmp_path, options, told) -> None:
    given = {"reducer": "scope", "tokens": (6,), "picture_tokens": 13} | options
    with pytest.raises(OptionError) as raised:
        plan_build(BuildOptions(str(checkpoint), tmp_path / "out", **given))
    assert told in str(raised.value)


def test_a_checkpoint_of_one_square_has_nothing_to_share(language_checkpoint, tmp_path) -> None:
    options: dict[str, Any] = {"reducer": "scope", "tokens": (6,), "picture_tokens": 13}
    with pytest.raises(OptionError, match=r"a picture is one square for .* Use --tokens 13"):
        plan_build(BuildOptions(str(language_checkpoint), tmp_path / "out", **options))
