"""What a bundle says of pictures in tiles: counted, checked, and absent from older bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle, open_bundle
from engines.errors import BundleError
from engines.inspect import describe_bundle, main
from engines.picture_tiles import PictureTiles
from engines.trt.batch_profile import ONE_IMAGE, BatchRange, usual_batch
from tests.tiny_bundle import tiny_manifest, write_tiny_bundle

NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def tiles_of(**changes: Any) -> dict[str, Any]:
    return {"side": 8, "resolutions": [[8, 16], [16, 16]], "newline": "tokenizer.json"} | changes


def test_llava_next_has_2880_tokens_and_48_newlines() -> None:
    tiles = PictureTiles(side=336, resolutions=NEXT, newline="newline.safetensors")
    assert tiles.most_squares == 5
    assert tiles.most_tokens(576, 24, "none") == 2880 + 48
    assert tiles.most_tokens(64, 24, "visionzip") == 5 * 64 + 48


def test_a_bound_on_all_tokens_counts_for_all_tokens_alone() -> None:
    resolutions = tuple((384 * rows, 384 * columns) for rows in (1, 6) for columns in (1, 6))
    bounded = PictureTiles(
        side=384, resolutions=resolutions, newline="newline.safetensors", most_tiles=9
    )
    assert bounded.scaled_down(81, 81, 27) == (81, 81)
    assert bounded.scaled_down(81, 98, 27) == (81, 98)  # 1.09995 times too long
    assert bounded.scaled_down(81, 99, 27) == (73, 89)
    assert bounded.scaled_down(162, 162, 27) == (81, 81)
    assert bounded.most_tokens(729, 27, "none") == 729 + 7939 + 162
    assert bounded.most_tokens(729, 27, "uniform") == 37 * 729 + 162
    unbounded = bounded.model_copy(update={"most_tiles": None})
    assert unbounded.scaled_down(162, 162, 27) == (162, 162)
    assert unbounded.most_tokens(729, 27, "none") == 37 * 729 + 162


def test_a_shared_budget_bounds_a_picture() -> None:
    tiles = PictureTiles(
        side=336, resolutions=NEXT, newline="newline.safetensors", picture_tokens=160
    )
    assert tiles.most_tokens(64, 24, "scope") == 160 + 72  # three tiles have 72 rows
    assert tiles.most_tokens(20, 24, "scope") == 80 + 72  # of four squares; of five, 100 + 48
    few = tiles.model_copy(update={"picture_tokens": 16})
    assert few.most_tokens(64, 24, "scope") == 16 + 16  # no row is ended that has no token


def test_the_graph_with_most_tokens_need_not_be_that_of_all(tmp_path: Path) -> None:
    root = write_tiny_bundle(tmp_path / "tiled", tiles=tiles_of(most_tiles=1))
    bundle = open_bundle(root)
    (one, *_), tiles = bundle.manifest.vision, bundle.manifest.tiles
    assert tiles is not None
    few = one.reducer.model_copy(update={"tokens": 3, "name": "visionzip"})
    every = one.reducer.model_copy(update={"tokens": 4, "name": "none"})
    graphs = tuple(one.model_copy(update={"reducer": each}) for each in (every, few))
    other = Bundle(root, bundle.manifest.model_copy(update={"vision": graphs}))
    assert other.largest_vision() is graphs[1]


def test_a_plan_takes_the_squares_of_one_picture_at_once() -> None:
    assert usual_batch(1) == ONE_IMAGE
    assert usual_batch(5) == BatchRange(1, 5, 5)


def test_a_bundle_counts_its_squares(tmp_path: Path) -> None:
    bundle = open_bundle(write_tiny_bundle(tmp_path / "tiled", tiles=tiles_of()))
    assert bundle.most_squares == 5
    assert bundle.most_visual_tokens(bundle.vision()) == 5 * 2 + 2 * 2
    assert describe_bundle(bundle)["tiles"]["newlines"] == "rows"
    plain = open_bundle(write_tiny_bundle(tmp_path / "plain"))
    assert (plain.most_squares, plain.most_visual_tokens(plain.vision())) == (1, 2)


def test_a_clip_is_pooled_where_the_prompt_has_a_place_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tiny_manifest()["prompt"]
    root = write_tiny_bundle(
        tmp_path / "clips",
        tiles=tiles_of(clips={"frames": 8}),
        prompt=prompt | {"video_token": "<video>"},
    )
    bundle = open_bundle(root)
    assert bundle.clips is not None
    assert bundle.clips.frames == 8
    assert bundle.clips.pooled(27, 27) == (14, 14)
    main(root, verify=True)
    assert "each frame is pooled to 1 x 1 tokens" in capsys.readouterr().out
    without = write_tiny_bundle(tmp_path / "no-place", tiles=tiles_of(clips={}), prompt=prompt)
    assert open_bundle(without).clips is None
    assert open_bundle(write_tiny_bundle(tmp_path / "plain")).clips is None


def test_a_bundle_from_before_tiles_still_opens(tmp_path: Path) -> None:
    root = write_tiny_bundle(tmp_path / "old")
    file = root / "bundle.json"
    document = json.loads(file.read_text())
    del document["tiles"], document["checksum"]
    file.write_text(json.dumps(document | {"schema_version": 2}))
    assert open_bundle(root).manifest.tiles is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"side": 4}, "tiles.side is 4, and preprocessing gives 8 x 8"),
        ({"resolutions": [[8, 12]]}, "8 x 12, expected multiples of 8 pixels"),
        ({"resolutions": [[8, 8 * 65]]}, "at most 64 tiles"),
        ({"resolutions": []}, "tiles.resolutions is empty"),
        ({"newline": "absent.safetensors"}, 'tiles.newline is "absent.safetensors"'),
        ({"newlines": "columns"}, "tiles.newlines is"),
        ({"most_tiles": 0}, "tiles.most_tiles is 0"),
        ({"picture_tokens": 0}, "tiles.picture_tokens is 0"),
        ({"picture_tokens": 2**30}, "tiles.picture_tokens is 1073741824"),
        ({"picture_tokens": 9}, "vision[0] does not say what its tokens are worth (token_worth)"),
        ({"kind": "frames"}, "tiles.kind is"),
        ({"clips": {"frames": 65}}, "tiles.clips.frames is 65"),
        ({"several": "rows"}, "tiles.several is"),
    ],
)
def test_tiles_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    root = write_tiny_bundle(tmp_path / "tiled", tiles=tiles_of())
    file = root / "bundle.json"
    document = json.loads(file.read_text())
    document["tiles"] |= changes
    file.write_text(json.dumps(document))
    with pytest.raises(BundleError) as raised:
        open_bundle(root)
    assert told in str(raised.value)
