"""Does a bundle still say what its checkpoint says? `python -m export.verify` asks.

Enters: bundles, the checkpoint they were built from, and pictures. Leaves: how far what each graph
makes of the pictures, on each engine, is from what PyTorch makes of them, and where in the graph
the two part. `comparison` holds the comparison, `candidates` and `sides` what is compared,
`report`, `tables` and `page` what is told, `golden_run` the same for NVIDIA's Polygraphy.
"""

from export.verify.comparison import VerifyOptions, verify_bundles

__all__ = ["VerifyOptions", "verify_bundles"]
