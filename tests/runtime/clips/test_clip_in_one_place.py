"""LLaVA-OneVision's clips on a tiny random model: pixels, tokens, answers, what frames cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from engines.bundle import Bundle, open_bundle
from engines.errors import OptionError
from export.build import BuildOptions, build_bundle
from export.language.language_models import DecoderOptions
from runtime.clips.clip import ClipAnswer, ask_about_clip, measure_newness
from runtime.clips.clip_options import ClipOptions
from runtime.clips.frame_budgets import frame_budgets_of
from runtime.clips.one_place import join_frames
from runtime.commands.ask import ask, document_from_answer
from runtime.frames import Frame
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import Model, open_model
from runtime.model_options import ModelOptions
from runtime.vision import VisionEncoder, VisualTokens
from runtime.vision.graph_pool import GraphPool
from tests.tiny_tiles import MEAN, SIDE, STD, VIDEO, picture_of, tiny_llava_onevision, write_tiled

QUESTION = "What happened?"
SHORT = GenerationOptions(max_tokens=8)
POOLED = 4  # of 16 patches
Pictures = list[np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiled(tmp_path_factory.mktemp("clips") / "tiny", tiny_llava_onevision())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlavaOnevisionForConditionalGeneration:
    loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    return loaded.eval()


def built(checkpoint: Path, out: Path, **options: Any) -> Bundle:
    decoders = DecoderOptions(precision="fp32")
    build_bundle(BuildOptions(str(checkpoint), out, decoders=decoders, **options))
    return open_bundle(out)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All tokens, and the ranking of 8 of each square."""
    out = tmp_path_factory.mktemp("bundles") / "ranking"
    return built(checkpoint, out, reducer="divprune", tokens=("all", 8))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[Model]:
    with open_model(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def reduced(bundle: Bundle) -> Iterator[Model]:
    with open_model(bundle, threads=1, visual_tokens=8) as opened:
        yield opened


def moving(count: int, height: int = 40, width: int = 60) -> Pictures:
    """A window that moves over a photograph: nearly everything is new in every frame."""
    wide = picture_of(height, width + 30 * count)
    return [wide[:, 30 * at : 30 * at + width] for at in range(count)]


def shaded(count: int) -> Pictures:
    """Frames of one grey each: the whole of every frame is new."""
    return [np.full((40, 60, 3), 40 * at, np.uint8) for at in range(count)]


def frames_of(pictures: Pictures) -> list[Frame]:
    return [Frame(picture, at * 10**8, "test") for at, picture in enumerate(pictures)]


def pixels_of(pictures: Pictures) -> torch.Tensor:
    """What transformers' video processor makes of frames, float32[1, F, 3, SIDE, SIDE].

    It needs torchvision, whose resize of uint8 is this: PyTorch's own.
    """
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    resized = functional.interpolate(stacked, (SIDE, SIDE), mode="bicubic", antialias=True)
    levels = resized.float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((levels - mean) / std)[None]


@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 60), (21, 90)])
def test_pixels_of_frames_are_those_of_transformers(bundle, size) -> None:
    """To two levels of 255, where a frame is resized: ours and PyTorch's are one from Pillow's."""
    pictures = moving(3, *size)
    with VisionEncoder(bundle, threads=1) as encoder:
        ours = encoder.layout_of("frame").pixel_values(pictures, encoder._bands)
    allowed = 0.0 if size == (SIDE, SIDE) else 2 / 255 / min(STD)
    np.testing.assert_allclose(ours, pixels_of(pictures)[0], atol=allowed + 1e-5)


@torch.no_grad()
def test_all_tokens_are_those_of_transformers(reference, model) -> None:
    """Seven frames: more than one run of a graph takes where there are few tiles."""
    pictures = moving(7, SIDE, SIDE)
    expected = reference.model.get_video_features(pixels_of(pictures)).pooler_output[0]
    clip = clip_of(model, pictures)
    assert clip.tokens.shape[1] == 7 * POOLED + 1
    np.testing.assert_allclose(clip.tokens_of(0), expected.numpy(), atol=1e-4)


def clip_of(model: Model, pictures: Pictures) -> VisualTokens:
    with GraphPool(model.bundle, opened=model.encoder) as pool:
        budgets = frame_budgets_of(pool, model.encoder.graph)
        seen = budgets.encode(pool, pictures, [budgets.steps[-1]] * len(pictures))
    return join_frames(seen, model.encoder.layout.newline)


@torch.no_grad()
def test_the_greedy_answer_is_that_of_transformers(reference, model, checkpoint) -> None:
    pictures = moving(3, SIDE, SIDE)
    answer = answer_about(model, pictures)
    assert [frame.visual_tokens for frame in answer.frames] == [POOLED] * 3
    assert answer.visual_tokens == 3 * POOLED + 1
    ids = chat_ids(checkpoint)
    at = ids.index(VIDEO)
    ids = [*ids[:at], *[VIDEO] * (3 * POOLED + 1), *ids[at + 1 :]]
    written = reference.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values_videos=pixels_of(pictures),
        max_new_tokens=8,
        do_sample=False,
    )
    said = [one for one in written[0, len(ids) :].tolist() if one != 2]
    assert answer.prompt_tokens == len(ids)
    assert len(said) > 2
    assert said == list(answer.token_ids)


def chat_ids(checkpoint: Path) -> list[int]:
    """What transformers' tokenizer makes of the question about a clip."""
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    return list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
        )
    )


def answer_about(model: Model, pictures: Pictures, total: int | None = None) -> ClipAnswer:
    with GraphPool(model.bundle, opened=model.encoder, threads=1) as pool:
        frames = frames_of(pictures)
        return ask_about_clip(model, frames, QUESTION, pool, total=total, generation=SHORT)


def shares_of(answer: ClipAnswer) -> list[int]:
    return [frame.visual_tokens for frame in answer.frames]


def test_the_prompt_is_that_of_transformers_and_words_are_words(checkpoint, model) -> None:
    ids = model.writer.ids([Turn("user", QUESTION, clips=1)]).tolist()
    expected = chat_ids(checkpoint)
    marked = [model.writer.image_token_id if one == VIDEO else one for one in expected]
    assert ids == marked
    typed = model.writer.ids([Turn("user", "Is <video> a word?", clips=1)]).tolist()
    assert typed.count(model.writer.image_token_id) == 1
    assert VIDEO not in typed
    assert "<video>" not in model.writer.render([Turn("user", QUESTION, clips=1)])


def test_a_still_clip_costs_all_frames_in_training_and_one_with_a_reducer(model, reduced) -> None:
    still = [picture_of(40, 60)] * 4
    assert measure_newness(still) == [1, 0, 0, 0]
    assert shares_of(answer_about(model, still)) == [POOLED] * 4  # as transformers
    assert shares_of(answer_about(model, still, total=40)) == [POOLED, 0, 0, 0]
    assert shares_of(answer_about(reduced, still)) == [8, 0, 0, 0]


def test_a_reducer_that_ranks_spends_the_total_to_the_last_token(reduced) -> None:
    """By default as many tokens as pooled frames have; the newline comes on top."""
    answer = answer_about(reduced, shaded(3))
    assert shares_of(answer) == [POOLED] * 3
    assert answer.visual_tokens == 3 * POOLED + 1
    assert sum(shares_of(answer_about(reduced, shaded(3), total=7))) == 7
    assert shares_of(answer_about(reduced, shaded(3), total=60)) == [8] * 3


def test_frames_hold_the_first_tokens_by_rank_unpooled(reduced) -> None:
    pictures = moving(2)
    seen = answer_about(reduced, pictures, total=6).seen
    assert [one.tokens.shape[1] for one in seen] == [3, 3]
    for one, picture in zip(seen, pictures, strict=True):
        alone = reduced.encoder.encode([picture], "frame")
        chosen = alone.first(3)
        np.testing.assert_allclose(one.tokens, chosen.tokens, atol=1e-5)
        assert (one.origin >= 0).all()
        assert one.budget == 8


def test_a_reducer_that_does_not_rank_shares_by_the_budgets_of_the_bundle(
    checkpoint, tmp_path
) -> None:
    bundle = built(checkpoint, tmp_path / "uniform", reducer="uniform", tokens=(2, 6))
    with open_model(bundle, threads=1) as opened:
        assert shares_of(answer_about(opened, shaded(3))) == [2, 2, 6]
        with pytest.raises(OptionError, match="one frame takes 2 at least"):
            answer_about(opened, shaded(3), total=1)


def test_joined_frames_say_which_patches_their_tokens_were_made_from(reduced) -> None:
    frames = answer_about(reduced, moving(2), total=7).seen
    joined = join_frames(frames, np.zeros(64, np.float32))
    assert joined.valid.tolist() == [8]
    assert joined.origin[0, -1] == -1
    first, second = frames
    assert joined.origin[0, :-1].tolist() == [*first.origin[0], *(second.origin[0] + 16)]
    for slot, patch in enumerate(joined.origin[0, :-1]):
        assert joined.assignment[0, patch] == slot


def test_ask_answers_a_video_and_draws_its_last_frame(
    bundle, tmp_path, write_video: Callable[..., Path]
) -> None:
    video = write_video([20, 20, 90, 220])
    answer = ask(
        bundle.root,
        video,
        QUESTION,
        model=ModelOptions(threads=1, visual_tokens=8),
        generation=SHORT,
        clip=ClipOptions(clip_frames=4, clip_tokens=10),
        overlay=tmp_path / "last.png",
    )
    assert isinstance(answer, ClipAnswer)
    assert [given > 0 for given in shares_of(answer)] == [True, False, True, True]
    document = document_from_answer(answer, bundle)
    assert document["visual_tokens"] == 11
    assert document["patches"] == 16
    assert document["reducer"] == "divprune"
    assert (tmp_path / "last.png").stat().st_size


def test_the_checkpoint_says_how_many_frames_it_expects(
    checkpoint, tmp_path, write_video: Callable[..., Path]
) -> None:
    changed = copied(checkpoint, tmp_path / "five", num_frames=5)
    bundle = built(changed, tmp_path / "bundle", reducer="none")
    assert bundle.clips is not None
    assert bundle.clips.frames == 5
    video = write_video([20, 40, 60, 80, 100, 120, 140, 160, 180])
    options = {"model": ModelOptions(threads=1), "generation": SHORT}
    assert len(ask(bundle.root, video, QUESTION, **options).frames) == 5
    two = ask(bundle.root, video, QUESTION, clip=ClipOptions(clip_frames=2), **options)
    assert len(two.frames) == 2


def copied(checkpoint: Path, root: Path, **fields: Any) -> Path:
    """Return a copy of a checkpoint whose video processor says something else."""
    root.mkdir()
    for each in checkpoint.iterdir():
        (root / each.name).symlink_to(each)
    file = root / "video_preprocessor_config.json"
    content = json.loads(file.read_text()) | fields
    file.unlink()
    file.write_text(json.dumps(content))
    return root


def test_a_checkpoint_whose_clips_cannot_be_seen_is_built_for_pictures(
    checkpoint, tmp_path, write_video: Callable[..., Path]
) -> None:
    changed = copied(checkpoint, tmp_path / "grey", image_mean=[0.5, 0.5, 0.5])
    out = tmp_path / "bundle"
    report = build_bundle(BuildOptions(str(changed), out, reducer="uniform", tokens=(2,)))
    assert "prepared differently from a picture (mean)" in " ".join(report.notes)
    with pytest.raises(OptionError, match="cannot be asked about a clip"):
        ask(out, write_video([20, 200]), QUESTION)


def test_a_template_without_a_clip_is_told_of(
    checkpoint, tmp_path, write_video: Callable[..., Path]
) -> None:
    changed = copied(checkpoint, tmp_path / "plain")
    template = (checkpoint / "chat_template.jinja").read_text()
    (changed / "chat_template.jinja").unlink()
    (changed / "chat_template.jinja").write_text(template.replace("'video'", "'film'"))
    out = tmp_path / "bundle"
    report = build_bundle(BuildOptions(str(changed), out, reducer="uniform", tokens=(2,)))
    assert "chat template has no place for one" in " ".join(report.notes)
    with pytest.raises(OptionError, match="its chat template has no place for one"):
        ask(out, write_video([20, 200]), QUESTION)
    with open_model(out, threads=1) as opened, pytest.raises(OptionError, match="as pictures"):
        opened.writer.ids([Turn("user", QUESTION, clips=1)])


def test_a_bundle_of_before_has_no_clips(bundle) -> None:
    """What schema 3 did not say at first may be left out."""
    fields = bundle.manifest.model_dump(mode="json")
    del fields["tiles"]["clips"], fields["prompt"]["video_token"]
    older = type(bundle.manifest).model_validate(fields)
    assert Bundle(bundle.root, older).clips is None
    assert bundle.clips is not None
