"""Videos, for the attacks on what reads them."""

from tests.runtime.conftest import write_video

__all__ = ["write_video"]
