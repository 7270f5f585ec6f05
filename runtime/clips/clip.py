"""Answer a question about a clip from a few of its frames, with more tokens where more is new.

The prompt holds an image for each frame that is not left out, in the order of time. A frame costs
as many tokens as one of the bundle's graphs gives, so a bundle of several budgets shares better;
with one graph, fewer frames are in the prompt. A checkpoint that was trained on single images may
make little of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.errors import OptionError, SourceError
from runtime.camera.scene_change import block_means, changed_share
from runtime.clips.clip_options import ClipOptions
from runtime.clips.token_sharing import share_tokens
from runtime.frames import Frame, FrameSource, SourceOptions, open_source
from runtime.frames.frame_sampler import EvenSample, pick_evenly
from runtime.frames.source import UndecodedFrame
from runtime.language.generate import GenerationOptions
from runtime.model import Answer, Model, Show
from runtime.vision import Pixels, VisualTokens
from runtime.vision.graph_pool import GraphPool

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
    """

    frames: tuple[ClipFrame, ...] = ()

    @property
    def last_told(self) -> int:
        """Which of `frames` the last of `seen` is."""
        return max(at for at, frame in enumerate(self.frames) if frame.visual_tokens)


def refuse_clip_of_tiles(bundle: Bundle) -> None:
    """Check that a bundle sees a picture as one square: a clip's frames share tokens by that.

    Raises:
        OptionError: it cuts pictures into tiles.
    """
    if bundle.manifest.tiles is not None:
        raise OptionError(
            f"{bundle.root} cuts every picture into up to {bundle.most_squares} squares, and the "
            "frames of a clip are told of as one square each. Ask about single pictures, or build "
            "the bundle of a checkpoint that sees a picture as one square."
        )


def read_clip(path: str, options: ClipOptions) -> list[Frame]:
    """Return frames spread evenly over a recording, the first and the last among them.

    Raises:
        SourceError: it cannot be opened, or has no frame that can be read.
        OptionError: a topic of what has none.
    """
    with open_source(path, SourceOptions(topic=options.topic)) as source:
        frames = spread_frames(source, options.clip_frames)
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


def encode_frames(
    pool: GraphPool, images: Sequence[Pixels], tokens: Sequence[int]
) -> list[VisualTokens]:
    """Encode frames, those with equally many tokens as one batch; those with none are left out.

    Raises:
        EngineError: a graph cannot be loaded, or failed.
    """
    encoded: dict[int, VisualTokens] = {}
    for budget in sorted(set(tokens) - {0}):
        places = [at for at, given in enumerate(tokens) if given == budget]
        batch = pool.encoder(budget).encode([images[at] for at in places])
        encoded |= dict(zip(places, batch.split(), strict=True))
    return [encoded[at] for at in sorted(encoded)]


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
        total: visual tokens to spend at most; None spends as many as one image has patches.
        generation: how the answer is written.
        system: instructions before the question.
        show: called with each piece of the answer as it is written.

    Raises:
        OptionError: ``total`` is too small, or the chat template refuses the conversation.
        FoveateError: anything else the user can fix.
    """
    images = [frame.image for frame in frames]
    newness = measure_newness(images)
    graph = model.encoder.graph
    tokens = share_tokens(newness, pool.budgets, total or graph.patch_rows * graph.patch_columns)
    seen = encode_frames(pool, images, tokens)
    answer = model.answer_about(seen, question, generation, system=system, show=show)
    return ClipAnswer(
        **vars(answer),
        frames=tuple(
            ClipFrame(frame.timestamp_ns, new, given)
            for frame, new, given in zip(frames, newness, tokens, strict=True)
        ),
    )
