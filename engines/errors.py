"""The errors that a user can fix: each says what is wrong, what was expected and what to do.

Anything that the user's own files, options or machine can cause is a `FoveateError` and ends a
command with exit code 2. Any other exception is a defect of Foveate: exit code 70 and a report.
"""

from __future__ import annotations


class FoveateError(Exception):
    """A mistake in the input, described in one paragraph: what, got, expected, how to fix."""


class OptionError(FoveateError):
    """An option, or a combination of options, that cannot be served."""


class CheckpointError(FoveateError):
    """A checkpoint that cannot be opened or is of an architecture Foveate does not know."""


class BundleError(FoveateError):
    """A bundle that is missing, damaged, changed since it was built, or newer than this code."""


class PictureError(FoveateError):
    """A picture that cannot be read or cannot be given to a vision tower."""


class EngineError(FoveateError):
    """An engine that cannot be built, loaded or run on this machine."""


class BackendError(FoveateError):
    """An LLM backend that cannot be started or refused its input."""


class SourceError(FoveateError):
    """A camera, video, bag or folder that frames cannot be read from."""


class CalibrationError(FoveateError):
    """A calibration that is damaged, was made for another checkpoint, or misses its gate."""


class GateError(CalibrationError):
    """An INT8 graph that agrees less with FP32 than its gate allows; commands end with 1."""
