"""The command of every script that writes a data set: a seed, a count and a folder.

A function that writes enters; an exit status leaves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def run_writer(
    text: str | None, write: Callable[[int, int, Path], int], noun: str, count: int = 1000
) -> int:
    """Read the command line and write.

    Args:
        text: of the module; its first line is the help.
        write: writes `count` items of a seed under a folder; returns the number of questions.
        noun: what the items are called.
        count: how many by default.
    """
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = write(options.seed, options.count, options.out)
    print(f"{options.out}: {options.count} {noun}, {asked} questions", file=sys.stderr)
    return 0
