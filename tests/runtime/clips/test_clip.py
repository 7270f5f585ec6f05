"""Questions about clips: which frames are told of, what they cost, what the model is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from engines.bundle import Bundle
from engines.cli import make_app
from engines.errors import OptionError, SourceError
from runtime.clips.clip import ClipAnswer, measure_newness, read_clip, spread_frames
from runtime.clips.clip_options import ClipOptions, is_clip
from runtime.commands.ask import ask, document_from_answer, main
from runtime.frames import FrameSource
from runtime.frames.frame import Capture, ReadErrors
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import open_model
from runtime.model_options import ModelOptions

QUESTION = "What happened?"
SHORT = GenerationOptions(max_tokens=5)


class Counted:
    """A recording that counts how many of its pictures are decoded."""

    name = "counted"
    live = False

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.count, self.broken, self.decoded = count, broken, 0

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for number in range(self.count):
            yield Capture(number, lambda number=number: self.picture(number))

    def picture(self, number: int) -> np.ndarray:
        if number in self.broken:
            raise SourceError("damaged")
        self.decoded += 1
        return np.full((8, 8, 3), number % 256, np.uint8)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 100, 1001])
@pytest.mark.parametrize("most", [1, 2, 8])
def test_frames_are_spread_and_only_they_are_decoded(count: int, most: int) -> None:
    reader = Counted(count)
    frames = spread_frames(FrameSource(reader), most)
    times = [frame.timestamp_ns for frame in frames]
    assert len(times) == min(count, most) == reader.decoded
    assert times == sorted(set(times))
    assert times[-1] == count - 1  # the last one always
    if most > 1:
        assert times[0] == 0
        gaps = np.diff(times)
        assert gaps.size == 0 or gaps.max() <= 2.5 * (count - 1) / len(gaps)


def test_a_damaged_frame_is_left_out() -> None:
    frames = spread_frames(FrameSource(Counted(8, frozenset({3}))), 8)
    assert [frame.timestamp_ns for frame in frames] == [0, 1, 2, 4, 5, 6, 7]


def test_newness_is_the_share_that_changed() -> None:
    still = np.random.default_rng(0).integers(40, 200, (256, 256, 3)).astype(np.uint8)
    noisy = (still + np.random.default_rng(1).integers(-5, 6, still.shape)).astype(np.uint8)
    quarter = noisy.copy()
    quarter[:128, :128] = 255 - quarter[:128, :128] // 2
    assert measure_newness([still, noisy, quarter, noisy, noisy]) == [1, 0, 0.25, 0.25, 0]
    assert measure_newness([still, still[:64]]) == [1, 1]  # another size is another scene


def test_what_creeps_is_noticed_once_it_has_gone_far_enough() -> None:
    frames = [np.full((64, 64, 3), 100 + 2 * step, np.uint8) for step in range(9)]
    assert measure_newness(frames) == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def answer_clip(bundle: Bundle, path: Path, **changes: object) -> ClipAnswer:
    fields = {"clip": ClipOptions(**changes), "generation": SHORT}
    answer = ask(bundle.root, path, QUESTION, model=ModelOptions(threads=1), **fields)
    assert isinstance(answer, ClipAnswer)
    return answer


def shares_of(answer: ClipAnswer) -> list[int]:
    return [frame.visual_tokens for frame in answer.frames]


def test_the_prompt_holds_the_frames_that_were_told_of(
    write_video: Callable[..., Path], budgets_bundle: Bundle
) -> None:
    """Each with its tokens, in their order: the answer is that of the same prompt by hand."""
    path = write_video([20, 20, 90, 90, 90, 220])
    answer = answer_clip(budgets_bundle, path, clip_tokens=30)
    assert shares_of(answer) == [12, 0, 6, 0, 0, 12]
    assert answer.visual_tokens == 30
    assert answer.last_told == 5
    frames = read_clip(str(path), ClipOptions())
    with open_model(budgets_bundle, threads=1) as few:
        with open_model(budgets_bundle, threads=1, visual_tokens=12) as many:
            seen = [
                many.encoder.encode([frames[0].image]),
                few.encoder.encode([frames[2].image]),
                many.encoder.encode([frames[5].image]),
            ]
        pictures = [visual.tokens_of(0) for visual in seen]
        expected = few.answer([Turn("user", QUESTION, images=3)], pictures, SHORT)
    assert answer.text == expected.text
    assert answer.prompt_tokens == expected.prompt_tokens
    for got, wanted in zip(answer.seen, seen, strict=True):
        np.testing.assert_allclose(got.tokens, wanted.tokens, atol=1e-5)


def test_a_still_clip_costs_one_frame_and_answers_as_its_picture(
    write_video: Callable[..., Path], budgets_bundle: Bundle
) -> None:
    path = write_video([120] * 12)
    answer = answer_clip(budgets_bundle, path, clip_tokens=400)
    assert shares_of(answer) == [12, *[0] * 7]
    with open_model(budgets_bundle, threads=1, visual_tokens=12) as model:
        last = read_clip(str(path), ClipOptions())[-1]
        assert answer.text == model.ask(last.image, QUESTION, SHORT).text


def test_with_one_graph_fewer_frames_are_told_of(
    write_video: Callable[..., Path], language_bundle: Bundle
) -> None:
    path = write_video([20, 90, 160, 230])
    assert shares_of(answer_clip(language_bundle, path, clip_tokens=40)) == [16, 0, 0, 16]
    assert shares_of(answer_clip(language_bundle, path)) == [0, 0, 0, 16]  # as one picture costs


def test_a_folder_and_the_json_document(tmp_path: Path, budgets_bundle: Bundle) -> None:
    for number, shade in enumerate((10, 200)):
        Image.fromarray(np.full((48, 64, 3), shade, np.uint8)).save(tmp_path / f"{number}.png")
    overlay = tmp_path.parent / f"{tmp_path.name}-overlay.png"
    arguments = [str(budgets_bundle.root), str(tmp_path), QUESTION, "--clip-tokens", "24"]
    arguments += ["--max-tokens", "2", "--overlay", str(overlay), "--json"]
    result = CliRunner().invoke(make_app(main), arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["clip"] == [
        {"seconds": 0.0, "newness": 1.0, "visual_tokens": 12},
        {"seconds": 1.0, "newness": 1.0, "visual_tokens": 12},
    ]
    assert document["visual_tokens"] == 24
    assert overlay.is_file()


def test_what_is_a_clip(tmp_path: Path) -> None:
    assert is_clip("a.MP4")
    assert is_clip("log.mcap")
    assert is_clip(tmp_path)
    assert not is_clip("photo.jpg")
    assert not is_clip("photo")


def test_mistakes(write_video: Callable[..., Path], budgets_bundle: Bundle, tmp_path: Path) -> None:
    path = write_video([20, 200])
    with pytest.raises(OptionError, match="5 visual tokens at most, and one frame takes 6"):
        answer_clip(budgets_bundle, path, clip_tokens=5)
    with pytest.raises(SourceError, match="no such file"):
        answer_clip(budgets_bundle, tmp_path / "nowhere.mp4")
    with pytest.raises(OptionError, match="has no topics"):
        answer_clip(budgets_bundle, path, topic="/front")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SourceError, match=r"broken\.mp4"):
        answer_clip(budgets_bundle, broken)


def test_a_picture_is_no_clip(budgets_bundle: Bundle, tmp_path: Path) -> None:
    """Its document has no frames."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((48, 64, 3), 9, np.uint8)).save(photo)
    answer = ask(
        budgets_bundle.root, photo, QUESTION, model=ModelOptions(threads=1), generation=SHORT
    )
    assert "clip" not in document_from_answer(answer, budgets_bundle)
