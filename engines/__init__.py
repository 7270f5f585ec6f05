"""The bundle on disk, deployment targets, and the engines that run a vision graph (floor 1)."""

__version__ = "0.1.0"
