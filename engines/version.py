"""The version of Foveate, for bundles, plans and the package."""

__version__ = "0.1.0"
