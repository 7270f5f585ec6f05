"""Act on what a camera shows: `python -m examples.camera_loop build/pocket 0 "QUESTION"`.

The source may be a camera, a video, a folder of pictures or a bag. Only the newest frame is
answered about, so the answers keep up with the world.
"""

from __future__ import annotations

import sys
from typing import Any

from runtime import watch


def act(line: dict[str, Any]) -> None:
    """Do something about an answer; here, tell it and how old its frame was."""
    if line["event"] == "answer":
        print(f"{line['answer']} (of {line['age_ms']:.0f} ms ago)")


def main(bundle: str, source: str, question: str) -> None:
    """Watch until the source ends, or Ctrl-C."""
    watch(bundle, source, question, act)


if __name__ == "__main__":
    main(*sys.argv[1:])
