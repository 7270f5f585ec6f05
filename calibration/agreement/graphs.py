"""Compare two files of one vision graph over the user's frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from calibration.agreement.stages import StageError, measure_stages, read_stages, tap_graph
from calibration.agreement.token_metrics import (
    Agreement,
    TokenAgreement,
    average_agreement,
    compare_visual_tokens,
)
from calibration.frames.dataset import Frames
from engines.manifest import ORDER_OUTPUT
from engines.ort import OrtSession, open_files
from engines.progress_bar import Progress
from engines.session import Array
from runtime.vision import VisualTokens
from runtime.vision.preprocess import PixelValues


def compare_graphs(
    reference: Sequence[Path],
    candidate: Sequence[Path],
    frames: Frames,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> Agreement:
    """Return how alike two graphs are over frames, of which there is at least one.

    Args:
        reference: its files, in the order they run.
        candidate: the same of the other.
        frames: float32[1, 3, H, W] each.
        threads: CPU threads.
        progress: called for every frame.
    """
    theirs = run_graph(reference, frames, threads)
    ours = run_graph(candidate, frames, threads, _telling(candidate, progress))
    return average_agreement(map(compare_visual_tokens, theirs, ours))


def compare_budgets(
    reference: Sequence[Path],
    candidate: Sequence[Path],
    frames: Frames,
    counts: Sequence[int],
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> dict[int, list[TokenAgreement]]:
    """Return how alike the budgets of two graphs are on each frame; see `compare_graphs`.

    Args:
        reference: its files, in the order they run.
        candidate: the same of the other.
        frames: float32[1, 3, H, W] each.
        counts: the budgets: how many tokens the graphs leave, or fewer where they rank.
        threads: CPU threads.
        progress: called for every frame.
    """
    theirs = run_graph(reference, frames, threads)
    ours = run_graph(candidate, frames, threads, _telling(candidate, progress))
    pairs = list(zip(theirs, ours, strict=True))
    return {
        count: [compare_visual_tokens(one.first(count), other.first(count)) for one, other in pairs]
        for count in counts
    }


def _telling(candidate: Sequence[Path], progress: Progress) -> Progress:
    """Return ``progress`` with the name of the graph, which of three files the second has."""
    name = candidate[min(1, len(candidate) - 1)].name
    return lambda line, done: progress(f"{name}: check of {line}", done)


def run_graph(
    files: Sequence[Path],
    frames: Frames,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> Iterator[VisualTokens]:
    """Yield what a graph makes of each frame, a batch of one each."""
    with open_files(files, threads=threads) as session:
        for at, pixels in enumerate(frames):
            progress(f"frame {at + 1}", at / len(frames))
            yield tokens_of(session.run({session.input_names[0]: pixels}))


def rank_stages(
    reference: Sequence[Path],
    candidate: Sequence[Path],
    frames: Iterable[PixelValues],
    threads: int | None = None,
) -> list[StageError]:
    """Return the stages by how much each adds to the error of the one before, the worst first.

    Args:
        reference: the float32 graph's files, in the order they run.
        candidate: those of the one to be judged.
        frames: a few; float32[1, 3, H, W] each.
        threads: CPU threads.
    """
    found: dict[str, list[StageError]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        tapped = [Path(folder) / f"{side}.onnx" for side in ("reference", "candidate")]
        taps = [tap_graph(*pair) for pair in zip((reference, candidate), tapped, strict=True)]
        with (
            OrtSession(tapped[0], threads=threads) as fp32,
            OrtSession(tapped[1], threads=threads) as int8,
        ):
            name = fp32.input_names[0]
            for pixels in frames:
                theirs, ours = (one.run({name: pixels}) for one in (fp32, int8))
                stages = read_stages(theirs, taps[0]), read_stages(ours, taps[1])
                for stage in measure_stages(*stages, tokens_of(theirs), tokens_of(ours)):
                    found[stage.stage].append(stage)
    means = [
        StageError(
            name,
            float(np.mean([one.error for one in each])),
            float(np.mean([one.growth for one in each])),
        )
        for name, each in found.items()
    ]
    return sorted(means, key=lambda one: one.growth, reverse=True)


def tokens_of(outputs: dict[str, Array]) -> VisualTokens:
    """Return what a vision graph's session returned as visual tokens."""
    return VisualTokens(
        tokens=outputs["visual_tokens"].astype(np.float32, copy=False),
        valid=outputs["valid_count"],
        origin=outputs["patch_index"],
        assignment=outputs["assignment"],
        milliseconds={},
        order=outputs.get(ORDER_OUTPUT),
    )
