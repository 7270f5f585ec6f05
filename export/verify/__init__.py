"""Check that a bundle answers like its checkpoint: `python -m export.verify`.

What each graph makes of pictures, on each engine, is compared with PyTorch's result, stage by
stage. `comparison` runs it on what `candidates` and `sides` open; `report`, `tables` and `page`
present it; `golden_run` writes the same check for NVIDIA's Polygraphy.
"""

from export.verify.comparison import VerifyOptions, verify_bundles

__all__ = ["VerifyOptions", "verify_bundles"]
