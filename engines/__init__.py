"""Floor 1: the bundle on disk, deployment targets, and the engines that run a vision graph."""

__version__ = "0.1.0"
