"""Keep finished parts of a bundle when a build fails or is stopped, for the next build.

They lie in `NAME.unfinished` beside the bundle. A part of another checkpoint, option or release is
deleted instead of used. The folder is removed when there is a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engines import __version__
from engines.errors import GateError
from engines.staging import is_disk_full
from export.checkpoint.llava import Checkpoint

_RECORD = "part.json"
_TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "gguf")


class KeptParts:
    """Finished parts, each under a name, with the options that it was made with.

    Attributes:
        folder: where they are.
    """

    def __init__(self, out: Path, checkpoint: Checkpoint) -> None:
        self.folder = out.with_name(f"{out.name}.unfinished")
        self._source = _fingerprint(checkpoint)

    def restore(self, name: str, options: Mapping[str, Any], root: Path) -> Any:
        """Put a part's files below ``root`` again.

        Args:
            name: of the part.
            options: what it must have been made with.
            root: where its files belong.

        Returns:
            What `keep` was told to remember, or None where there is no such part.
        """
        folder = self.folder / name
        try:
            record = json.loads((folder / _RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            self.drop(name)
            return None
        if record["key"] != self._key(options):
            self.drop(name)
            return None
        for file in record["files"]:
            _put(folder / file, root / file, linked=record["linked"])
        return record["remembered"]

    def keep(
        self,
        name: str,
        options: Mapping[str, Any],
        root: Path,
        files: Sequence[str],
        remembered: Any = True,
        *,
        linked: bool = True,
    ) -> None:
        """Keep a finished part.

        Args:
            name: of the part.
            options: what it was made with.
            root: where its files are.
            files: their names below it.
            remembered: a value for JSON.
            linked: the files take no room twice. ONNX refuses weights that have a second name, so a
                part that it reads again before the bundle is done is copied.
        """
        self.drop(name)
        folder = self.folder / name
        for file in files:
            _put(root / file, folder / file, linked=linked)
        record = {
            "key": self._key(options),
            "files": list(files),
            "linked": linked,
            "remembered": remembered,
        }
        unfinished = folder / f".{_RECORD}"
        unfinished.write_text(json.dumps(record), "utf-8")
        unfinished.replace(folder / _RECORD)

    def drop(self, name: str) -> None:
        """Forget a part."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    @contextmanager
    def until_done(self) -> Iterator[None]:
        """Keep the parts while the block may be tried again as it is.

        They go once it has a result, a missed gate included, and where the disk is full.
        """
        try:
            yield
        except GateError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        except Exception as error:
            if is_disk_full(error):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, options: Mapping[str, Any]) -> str:
        text = json.dumps([self._source, dict(options)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells a checkpoint and the tools from others, without reading the weights."""
    weights = checkpoint.weights
    files = {checkpoint.root / file for file, _ in weights.location.values()}
    states = {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    rest = {f.name: str(getattr(weights, f.name)) for f in fields(weights) if f.name != "location"}
    configs = {file.name: file.read_text("utf-8") for file in checkpoint.root.glob("*.json")}
    tools = {"foveate": __version__} | {tool: version(tool) for tool in _TOOLS}
    return {"files": states, "weights": rest, "configs": configs, "tools": tools}


def _put(source: Path, destination: Path, *, linked: bool) -> None:
    """Give a file a second name; copy it where it may not have one or the file system cannot."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if linked:
        with suppress(OSError):
            os.link(source, destination)
            return
    shutil.copy2(source, destination)
