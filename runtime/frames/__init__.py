"""Read frames from cameras, network streams, videos, bags, pictures and pipes.

    with open_source("/dev/video0", SourceOptions(rotate=180, fps=5)) as source:
        for frame in source:
            ...

There is one file per kind of source; `opening` chooses among them, and `source` is what they share.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.frames.frame import Frame as Frame
    from runtime.frames.frame import ReadErrors as ReadErrors
    from runtime.frames.opening import open_source as open_source
    from runtime.frames.source import FrameSource as FrameSource
    from runtime.frames.source import SourceOptions as SourceOptions
else:
    from engines.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Frame": "runtime.frames.frame",
            "FrameSource": "runtime.frames.source",
            "ReadErrors": "runtime.frames.frame",
            "SourceOptions": "runtime.frames.source",
            "open_source": "runtime.frames.opening",
        },
    )
