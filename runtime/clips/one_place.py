"""Put the frames of a clip into one place of the prompt, one after the other, a newline at the end.

So does LLaVA-OneVision. There is no text between the frames, and so no times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.vision.visual_tokens import VisualTokens


def join_frames(frames: Sequence[VisualTokens], newline: NDArray[np.float32]) -> VisualTokens:
    """Return the tokens of a clip as those of one picture.

    Args:
        frames: a batch of one each, in the order of time.
        newline: float32[D], what ends the clip.

    Returns:
        A batch of one. Patch p of frame f has the number f * P + p; the newline stands for none.
    """
    tokens, origins, assignments = [], [], []
    start = 0
    for number, frame in enumerate(frames):
        count, patches = int(frame.valid[0]), frame.assignment.shape[1]
        origin, assignment = frame.origin[0, :count], frame.assignment[0]
        tokens.append(frame.tokens_of(0))
        origins.append(np.where(origin >= 0, origin + number * patches, -1))
        merged, made = assignment < -1, assignment >= 0
        assignments.append(assignment + start * made.astype(np.int64) - start * merged)
        start += count
    sequence = np.concatenate([*tokens, newline[None]])
    return VisualTokens(
        tokens=sequence[None],
        valid=np.array([len(sequence)]),
        origin=np.concatenate([*origins, [-1]])[None],
        assignment=np.concatenate(assignments)[None],
        milliseconds={},
        square_budget=frames[0].budget,
    )
