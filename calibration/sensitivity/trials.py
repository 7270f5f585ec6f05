"""Measure the agreement of a graph with some layers in 8 bits, each choice of layers once.

Measurements are kept in a file, so that a continued search does not repeat them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from calibration.agreement.graphs import run_graph
from calibration.agreement.token_metrics import Agreement, average_agreement, compare_visual_tokens
from calibration.frames.dataset import Frames
from calibration.scales.apply import apply_calibration
from calibration.scales.calibration_file import Calibration
from calibration.scales.number_format import INT8, NumberFormat
from engines.errors import CalibrationError
from engines.staging import staged_file
from graphs.graph_file import HALF_OPSET, set_opset
from runtime.vision import VisualTokens

_FILE = TypeAdapter(dict[str, Agreement])


class KnownTrials:
    """What was measured so far, of any graph, calibration and frames, kept in a file."""

    def __init__(self, file: Path | None) -> None:
        """Read the file; None keeps nothing.

        Raises:
            CalibrationError: it is damaged.
        """
        self._file = file
        self._found: dict[str, Agreement] = {}
        if file is None or not file.exists():
            return
        try:
            self._found = _FILE.validate_json(file.read_bytes())
        except (ValidationError, OSError) as error:
            raise CalibrationError(
                f"{file} does not hold the trials of an interrupted search: it is cut short or "
                "damaged. Delete it to measure them again."
            ) from error

    def get(self, key: str) -> Agreement | None:
        """Return a trial; None if it was not measured."""
        return self._found.get(key)

    def add(self, key: str, agreement: Agreement) -> None:
        """Keep a trial."""
        self._found[key] = agreement
        if self._file is None:
            return
        content = {key: asdict(agreement) for key, agreement in self._found.items()}
        with staged_file(self._file, CalibrationError) as staged:
            staged.write_text(json.dumps(content), encoding="utf-8")


class Trials:
    """Measures one choice of layers after the other, on the same graph and frames."""

    def __init__(
        self,
        graph_files: Sequence[Path],
        apart: Path,
        calibration: Calibration,
        frames: Frames,
        threads: int | None,
        known: KnownTrials,
        form: NumberFormat = INT8,
    ) -> None:
        """Prepare.

        Args:
            graph_files: the float32 graph's files in the order they run, as `graphs.graph_file`
                writes them: with the digest of their weights in them, if they lie beside them.
            apart: the first of them with its weights apart (`graphs.weights_apart`); quantized
                graphs are written beside it for a moment.
            calibration: of its checkpoint; what it excludes has no meaning here.
            frames: float32[1, 3, H, W] each.
            threads: CPU threads.
            known: where trials are kept.
            form: what the layers become.

        Raises:
            CalibrationError: there are no frames.
        """
        if len(frames) == 0:
            raise CalibrationError("There are no frames to search on, expected at least one.")
        self._files = (apart, *graph_files[1:])
        self._frames, self._threads = frames, threads
        self._calibration = calibration
        self._known = known
        self._form = form
        self._subject = _identify(graph_files, calibration, frames, form)

    def measure(self, excluded: Collection[str]) -> Agreement:
        """Return the agreement of the graph with all but the excluded layers quantized."""
        names = tuple(name for name in self._calibration.layers if name in excluded)
        key = hashlib.sha256("\n".join((self._subject, *names)).encode()).hexdigest()
        found = self._known.get(key)
        if found is None:
            apart, *others = self._files
            model = ir.load(apart)
            if model.opset_imports[""] < HALF_OPSET and self._form is not INT8:
                set_opset(model, HALF_OPSET)
            apply_calibration(model, self._calibration.excluding(names), self._form)
            trial = apart.with_name("trial.onnx")
            ir.save(model, trial)
            made = run_graph((trial, *others), self._frames, self._threads)
            found = average_agreement(map(compare_visual_tokens, self._exact, made))
            self._known.add(key, found)
        return found

    @cached_property
    def _exact(self) -> list[VisualTokens]:
        return list(run_graph(self._files, self._frames, self._threads))


def _identify(
    graph_files: Sequence[Path], calibration: Calibration, frames: Frames, form: NumberFormat
) -> str:
    """Return a digest of what an agreement depends on, beside the layers that are quantized."""
    digest = hashlib.sha256()
    for file in graph_files:
        digest.update(np.memmap(file, np.uint8, "r").data)
    digest.update(calibration.excluding(()).digest().encode())
    if form is not INT8:
        digest.update(form.name.encode())
    for frame in frames:
        digest.update(np.ascontiguousarray(frame).tobytes())
    return digest.hexdigest()
