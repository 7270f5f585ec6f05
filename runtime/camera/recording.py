"""Record frames and the answers about them on disk.

Each answer gets three files: the frame, the overlay of what the language model saw, and the answer
as JSON. Each is written completely or not at all. A disk that is full, slow or gone costs
recordings and never the loop, nor its end; each one lost is counted.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import Counter
from contextlib import suppress
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
_PATIENCE_S = 10.0
"""How long the end waits for a disk on which nothing happens."""
_TICK_S = 0.05
TOO_SLOW, NOT_WRITTEN, ABANDONED = "disk too slow", "not written", "abandoned at the end"

_log = logging.getLogger(__name__)
_Job = tuple[CameraAnswer, dict[str, Any]]


class Recording:
    """A folder that answers are written to, by a thread of its own.

    Attributes:
        written: answers that are on disk.
        drops: answers that are not, by reason. That the disk is slower than the answers is to be
            expected; the other reasons are failures.
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
        self._closing = threading.Event()
        self._busy = self._abandoned = False
        self._thread = threading.Thread(target=self._write_all, name="recording", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """How many answers are not on disk though there was time to write them."""
        return self.drops[NOT_WRITTEN] + self.drops[ABANDONED]

    def keep(self, answer: CameraAnswer, document: dict[str, Any]) -> None:
        """Hand an answer over to be written; never waits.

        Args:
            answer: what to keep.
            document: the JSON that goes with it.
        """
        try:
            self._jobs.put_nowait((answer, document))
        except queue.Full:
            self.drops[TOO_SLOW] += 1

    def close(self) -> None:
        """Write what is waiting and stop; what a disk that hangs still holds is left behind."""
        self._closing.set()
        with suppress(queue.Full):  # then the thread is busy, and looks when the queue is empty
            self._jobs.put_nowait(None)
        finished, since_s = self._finished(), time.monotonic()
        while self._thread.is_alive() and not self._abandoned:
            self._thread.join(_TICK_S)
            if self._finished() != finished:
                finished, since_s = self._finished(), time.monotonic()
            elif time.monotonic() - since_s > _PATIENCE_S:
                break
        self._abandon()

    def _abandon(self) -> None:
        """Count what is still waiting or being written."""
        left = int(self._busy and not self._abandoned)
        self._abandoned = True
        with suppress(queue.Empty):
            while True:
                left += self._jobs.get_nowait() is not None
        if left:
            self.drops[ABANDONED] += left
            _log.warning("%s: %d answers were not recorded; the disk hangs", self._folder, left)

    def _finished(self) -> int:
        return self.written + self.drops[NOT_WRITTEN]

    def _write_all(self) -> None:
        while not (self._closing.is_set() and self._jobs.empty()):
            job = self._jobs.get()
            if job is None:
                return
            self._busy = True
            problem = self._problem_of_writing(*job)
            if self._abandoned:
                return
            if problem is None:
                self.written += 1
            else:
                self.drops[NOT_WRITTEN] += 1
                if self.drops[NOT_WRITTEN] == 1:
                    _log.warning("%s (recording goes on; more of these are counted)", problem)
            self._busy = False

    def _problem_of_writing(self, answer: CameraAnswer, document: dict[str, Any]) -> str | None:
        try:
            self._write(answer, document)
        except OptionError as error:
            return str(error)
        except Exception as error:  # an encoder's, or of a document: the next may be written
            return f"{self._folder}: {error!r}"
        return None

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
