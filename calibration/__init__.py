"""Quantize vision graphs on the user's own frames, and measure agreement (floor 4).

The name below is what others may rely on; it is imported when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibration.int8.bundle import calibrate_bundle as calibrate_bundle
else:
    from engines.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(__name__, {"calibrate_bundle": "calibration.int8.bundle"})
