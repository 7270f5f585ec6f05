"""The bundle on disk, deployment targets, and the engines that run a vision graph (floor 1).

The names below are what others may rely on; each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from engines.version import __version__ as __version__

if TYPE_CHECKING:
    from engines.build import build_engines as build_engines
    from engines.bundle import open_bundle as open_bundle
    from engines.opening import open_session as open_session
else:
    from engines.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "build_engines": "engines.build",
            "open_bundle": "engines.bundle",
            "open_session": "engines.opening",
        },
    )
