"""The bundle: a directory that holds everything the runtime needs, verified when it is opened.

`write_bundle` gives an exporter a staging directory and publishes it whole or not at all;
`open_bundle` checks the manifest and every file's SHA-256 before anything is loaded from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.manifest import Manifest


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle.

    Attributes:
        root: the directory.
        manifest: what `bundle.json` says.
    """

    root: Path
    manifest: Manifest
