"""Compare two files of one vision graph over the user's frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
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
from engines.ort import OrtSession
from engines.progress_bar import Progress
from engines.session import Array
from runtime.vision import VisualTokens
from runtime.vision.preprocess import PixelValues


def compare_graphs(
    reference: Path,
    candidate: Path,
    frames: Frames,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> Agreement:
    """Return how alike two graphs are over frames, of which there is at least one."""
    return average_agreement(compare_pictures(reference, candidate, frames, threads, progress))


def compare_pictures(
    reference: Path,
    candidate: Path,
    frames: Frames,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> list[TokenAgreement]:
    """Return how alike two graphs are on each frame."""

    def tell(line: str, done: float) -> None:
        progress(f"{candidate.name}: check of {line}", done)

    theirs = run_graph(reference, frames, threads)
    ours = run_graph(candidate, frames, threads, tell)
    return list(map(compare_visual_tokens, theirs, ours))


def run_graph(
    file: Path,
    frames: Frames,
    threads: int | None = None,
    progress: Progress = lambda line, done: None,
) -> Iterator[VisualTokens]:
    """Yield what a graph makes of each frame, a batch of one each."""
    with OrtSession(file, threads=threads) as session:
        for at, pixels in enumerate(frames):
            progress(f"frame {at + 1}", at / len(frames))
            yield tokens_of(session.run({session.input_names[0]: pixels}))


def rank_stages(
    reference: Path, candidate: Path, frames: Iterable[PixelValues], threads: int | None = None
) -> list[StageError]:
    """Return the stages by how much each adds to the error of the one before, the worst first.

    Args:
        reference: the float32 graph.
        candidate: the one to be judged.
        frames: a few; float32[1, 3, H, W] each.
        threads: CPU threads.
    """
    found: dict[str, list[StageError]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{side}.onnx" for side in ("reference", "candidate")]
        taps = [tap_graph(*pair) for pair in zip((reference, candidate), files, strict=True)]
        with (
            OrtSession(files[0], threads=threads) as fp32,
            OrtSession(files[1], threads=threads) as int8,
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
    )
