"""Read frames from cameras, network streams, videos, bags, pictures and pipes.

    with open_source("/dev/video0", rotate=180, fps=5) as source:
        for frame in source:
            ...

There is one file per kind of source; `opening` chooses among them, and `source` is what they share.
"""

from runtime.frames.frame import Frame, ReadErrors
from runtime.frames.opening import open_source
from runtime.frames.source import FrameSource, SourceOptions

__all__ = ["Frame", "FrameSource", "ReadErrors", "SourceOptions", "open_source"]
