"""Build a bundle from a checkpoint; `python -m export.build` is the command."""

from export.build.plan import BuildOptions
from export.build.steps import BuildReport, build_bundle

__all__ = ["BuildOptions", "BuildReport", "build_bundle"]
