"""Record frames and the answers about them on disk.

Each answer gets three files: the frame, the overlay of what the language model saw, and the answer
as JSON. Each is written completely or not at all. A full disk costs recordings and never the loop.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.staging import staged_file
from runtime.camera.parts import CameraAnswer
from runtime.vision.overlay import save_overlay

_WAITING = 4
"""Answers that may wait for the disk; more are dropped and counted."""

_log = logging.getLogger(__name__)
_Job = tuple[CameraAnswer, dict[str, Any]]


class Recording:
    """A folder that answers are written to, by a thread of its own.

    Attributes:
        written: answers that are on disk.
        drops: answers that are not, by reason.
    """

    def __init__(self, folder: Path, bundle: Bundle, cameras: int = 1) -> None:
        """Make the folder.

        Args:
            folder: where to write.
            bundle: whose answers they are.
            cameras: how many there are; of several, names begin with the camera's number.

        Raises:
            OptionError: it cannot be written to.
        """
        self.written = 0
        self.drops: Counter[str] = Counter()
        self._folder, self._bundle, self._cameras = folder, bundle, cameras
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"The recording folder {folder} cannot be made: {error.strerror}. Choose another."
            ) from error
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="recording", daemon=True)
        self._thread.start()

    def keep(self, answer: CameraAnswer, document: dict[str, Any]) -> None:
        """Hand an answer over to be written; never waits.

        Args:
            answer: what to keep.
            document: the JSON that goes with it.
        """
        try:
            self._jobs.put_nowait((answer, document))
        except queue.Full:
            self.drops["disk too slow"] += 1

    def close(self) -> None:
        """Write what is waiting and stop."""
        self._jobs.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except OptionError as error:
                self.drops["not written"] += 1
                if self.drops["not written"] == 1:
                    _log.warning("%s (recording goes on; more of these are counted)", error)
            else:
                self.written += 1

    def _write(self, answer: CameraAnswer, document: dict[str, Any]) -> None:
        queued = answer.encoded.queued
        frame = queued.frame
        camera = f"{queued.camera}-" if self._cameras > 1 else ""
        stem = self._folder / f"{camera}{queued.index:08d}"
        with staged_file(stem.with_suffix(".jpg"), OptionError) as staged:
            Image.fromarray(frame.image).save(staged, "JPEG", quality=90)
        save_overlay(
            stem.with_suffix(".overlay.png"), frame.image, answer.encoded.visual, self._bundle
        )
        # The JSON comes last: where it is, the pictures are.
        with staged_file(stem.with_suffix(".json"), OptionError) as staged:
            staged.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
