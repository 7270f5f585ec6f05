"""Answer a question about a clip from a few of its frames, with more tokens where more is new.

The prompt holds an image for each frame that is not left out, in the order of time; where the
checkpoint was trained on clips (LLaVA-OneVision), all frames stand in the one place of a clip, and
a newline ends it. `frame_budgets` says what a frame can cost: a bundle of several budgets shares
better; with one graph, fewer frames are in the prompt. A checkpoint that was trained on single
images may make little of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.errors import OptionError, SourceError
from engines.manifest import VisionGraph
from engines.memory.context_length import ContextNeed
from runtime.camera.scene_change import block_means, changed_share
from runtime.clips.clip_options import USUAL_FRAMES, ClipOptions
from runtime.clips.frame_budgets import frame_budgets_of, usual_total
from runtime.clips.one_place import join_frames
from runtime.clips.token_sharing import share_tokens
from runtime.frames import Frame, FrameSource, SourceOptions, open_source
from runtime.frames.frame_sampler import EvenSample, pick_evenly
from runtime.frames.source import UndecodedFrame
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import Answer, Model, Show
from runtime.vision import Pixels
from runtime.vision.graph_pool import GraphPool
from runtime.vision.layouts import newline_of

_NOTICEABLE = 6.0
"""Grey levels by which the mean of a block must change to be new; video compression stays below."""


@dataclass(frozen=True)
class ClipFrame:
    """What became of one frame that was looked at.

    Attributes:
        timestamp_ns: its time in the recording.
        newness: the share of it that differs from the last frame in which anything was new.
        visual_tokens: what it was given; 0: it was left out.
    """

    timestamp_ns: int
    newness: float
    visual_tokens: int


@dataclass(frozen=True)
class ClipAnswer(Answer):
    """An answer about a clip; `seen` holds the frames that were not left out.

    Attributes:
        frames: every frame that was looked at.
        newlines: tokens that stand for no frame.
    """

    frames: tuple[ClipFrame, ...] = ()
    newlines: int = 0

    @property
    def visual_tokens(self) -> int:
        """How many visual tokens came with the question, with what ends the clip."""
        return super().visual_tokens + self.newlines

    @property
    def last_told(self) -> int:
        """Which of `frames` the last of `seen` is."""
        return max(at for at, frame in enumerate(self.frames) if frame.visual_tokens)


def refuse_clip(bundle: Bundle) -> None:
    """Check that a bundle can be asked about a clip.

    Raises:
        OptionError: it cuts pictures into tiles, and its prompt has no place for a clip.
    """
    tiles = bundle.manifest.tiles
    if tiles is None or bundle.clips is not None:
        return
    reason = "its chat template has no place for one"
    if tiles.clips is None:
        reason = "it was built of one that takes none (as LLaVA-NeXT), or by an earlier Foveate"
    raise OptionError(
        f"{bundle.root} cuts every picture into up to {bundle.most_squares} squares, and cannot be "
        f"asked about a clip: {reason}. Ask about single pictures, or build the bundle of a "
        "LLaVA-OneVision checkpoint, or of one that sees a picture as one square."
    )


def frames_to_look_at(bundle: Bundle, options: ClipOptions) -> int:
    """Return how many frames of a clip are looked at: asked for, or as the checkpoint expects."""
    said = None if bundle.clips is None else bundle.clips.frames
    return options.clip_frames or said or USUAL_FRAMES


def context_need(
    bundle: Bundle, graph: VisionGraph, frames: int, options: ClipOptions
) -> ContextNeed:
    """Return what the KV cache has to hold for a clip of that many frames."""
    if bundle.clips is None:
        return ContextNeed(visual_tokens=options.clip_tokens, clip_frames=frames)
    total = options.clip_tokens or usual_total(bundle, graph, frames)
    return ContextNeed(visual_tokens=total + 1)


def read_clip(path: str, options: ClipOptions, most: int | None = None) -> list[Frame]:
    """Return frames spread evenly over a recording, the first and the last among them.

    Args:
        path: of the recording.
        options: how it is looked at.
        most: how many frames; left out, as the options say.

    Raises:
        SourceError: it cannot be opened, or has no frame that can be read.
        OptionError: a topic of what has none.
    """
    with open_source(path, SourceOptions(topic=options.topic)) as source:
        frames = spread_frames(source, most or options.clip_frames or USUAL_FRAMES)
        if not frames:
            raise SourceError(
                f"{path} has no frame that can be read. {source.errors.last or 'It is empty'}."
            )
    return frames


def spread_frames(source: FrameSource, most: int) -> list[Frame]:
    """Return at most that many frames spread over a source of unknown length.

    Only what is returned is decoded. One frame alone is the last, about now.
    """
    sample: EvenSample[UndecodedFrame] = EvenSample(most)
    last: UndecodedFrame | None = None
    for last in source.undecoded():
        if sample.wants_next():
            sample.add(last)
    if last is None:
        return []
    taken = sample.kept if sample.kept[-1] is last else [*sample.kept, last]
    decoded = (frame.decode() for frame in pick_evenly(taken if most > 1 else [last], most))
    return [frame for frame in decoded if frame is not None]


def measure_newness(images: Sequence[Pixels]) -> list[float]:
    """Return for each frame of a clip the share of it that is new, 0 to 1.

    The first is new as a whole. Each other one is compared, block by block, with the last one in
    which anything was new, so that what creeps is noticed once it has gone far enough. A camera
    that moves makes everything new: motion is not taken out.
    """
    newness: list[float] = []
    reference = None
    for image in images:
        blocks = block_means(image)
        share = 1.0 if reference is None else changed_share(blocks, reference, _NOTICEABLE)
        newness.append(share)
        if share > 0:
            reference = blocks
    return newness


def ask_about_clip(
    model: Model,
    frames: Sequence[Frame],
    question: str,
    pool: GraphPool,
    *,
    total: int | None = None,
    generation: GenerationOptions | None = None,
    system: str | None = None,
    show: Show | None = None,
) -> ClipAnswer:
    """Answer a question about a clip.

    Args:
        model: an opened bundle.
        frames: from `read_clip`.
        question: what to ask.
        pool: the bundle's graphs.
        total: visual tokens to spend at most on the frames; None spends what `usual_total` says, or
            what all frames take, if the checkpoint was trained on clips and no token is left out.
        generation: how the answer is written.
        system: instructions before the question.
        show: called with each piece of the answer as it is written.

    Raises:
        OptionError: the bundle cannot be asked about a clip, ``total`` is too small, or the chat
            template refuses the conversation.
        FoveateError: anything else the user can fix.
    """
    bundle, graph = model.bundle, model.encoder.graph
    refuse_clip(bundle)
    images = [frame.image for frame in frames]
    newness = measure_newness(images)
    budgets = frame_budgets_of(pool, graph)
    if budgets.pooled and total is None:  # as in training, whether anything is new or not
        tokens = (budgets.steps[0],) * len(frames)
    else:
        total = total or usual_total(bundle, graph, len(frames))
        tokens = share_tokens(newness, budgets.steps, total)
    seen = budgets.encode(pool, images, tokens)
    tiles = bundle.manifest.tiles
    if tiles is None:
        answer = model.answer_about(seen, question, generation, system=system, show=show)
    else:
        whole = join_frames(seen, newline_of(bundle, tiles))
        turns = [Turn("system", system)] if system else []
        turns.append(Turn("user", question, clips=1))
        answer = model.answer(turns, [model.picture_of(whole)], generation, show).with_seen(seen)
    return ClipAnswer(
        **vars(answer),
        frames=tuple(
            ClipFrame(frame.timestamp_ns, new, given)
            for frame, new, given in zip(frames, newness, tokens, strict=True)
        ),
        newlines=0 if tiles is None else 1,
    )
