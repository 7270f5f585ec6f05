"""Where frames come from: cameras, network streams, videos, bags, pictures and pipes.

    with open_source("/dev/video0", SourceOptions(rotate=180, fps=5)) as source:
        for frame in source:
            ...

One file per kind; `opening` chooses among them, `source` is what they have in common.
"""

from runtime.frames.frame import Frame, ReadErrors
from runtime.frames.opening import open_source
from runtime.frames.source import FrameSource, SourceOptions

__all__ = ["Frame", "FrameSource", "ReadErrors", "SourceOptions", "open_source"]
