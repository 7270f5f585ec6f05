"""Write the frames of a clip into a video file without loss, so that `runtime.ask` answers it.

    python models/pocket-onevision/events.py --seed 3 --count 20 --out CLIPS
    python models/pocket-onevision/clip_video.py CLIPS/00000 --out clip.mkv
    python -m runtime.ask BUNDLE clip.mkv "What happened first?"

A folder of pictures enters; a video in FFV1 leaves, whose frames have the same pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FRAMES_PER_SECOND = 4


def write_video(frames: Sequence[np.ndarray], out: Path) -> None:
    """Write frames, uint8[H, W, 3] in RGB, all of one size."""
    import av

    with av.open(str(out), "w") as container:
        stream = container.add_stream("ffv1", rate=FRAMES_PER_SECOND)
        stream.pix_fmt = "bgr0"
        stream.height, stream.width = frames[0].shape[:2]
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())


def read_pictures(folder: Path) -> list[np.ndarray]:
    """Return the frames that `events.py` wrote, in order."""
    return [np.array(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.png"))]


def main() -> int:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("clip", type=Path, help="folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="video file, such as clip.mkv")
    options = parser.parse_args()
    write_video(read_pictures(options.clip), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
