"""Save and restore the state of an interrupted calibration, as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engines.errors import CalibrationError
from engines.staging import staged_file

Arrays = Mapping[str, NDArray[Any]]

_KEY = "foveate.calibration_state"


@dataclass(frozen=True)
class State:
    """Sums over the first frames of one step.

    Attributes:
        step: name of the step.
        seen: frames that are in the sums.
        chain: sha256 of those frames, each hashed together with the ones before it.
        arrays: the sums by name.
    """

    step: str
    seen: int = 0
    chain: str = ""
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class StateFile:
    """Where states are kept.

    Attributes:
        path: the file; None keeps nothing.
        identity: what the calibration depends on beside its frames; a state of another one is
            refused.
    """

    path: Path | None
    identity: str

    def save(self, state: State) -> None:
        """Write a state over the one before."""
        if self.path is None or state.seen == 0:
            return
        header = {"identity": self.identity, "step": state.step, "chain": state.chain}
        metadata = {_KEY: json.dumps({**header, "seen": state.seen})}
        with staged_file(self.path, CalibrationError) as staged:
            save_file(dict(state.arrays), staged, metadata)

    def load(self) -> State | None:
        """Read the state back; None where there is none.

        Raises:
            CalibrationError: the file is damaged or of another calibration.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as opened:
                header = json.loads((opened.metadata() or {})[_KEY])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CalibrationError(
                f"{self.path} is not the state of an interrupted calibration ({error}). Delete it "
                "to start again."
            ) from error
        if header["identity"] != self.identity:
            raise self.refusal("another checkpoint, other options or another number of frames")
        return State(header["step"], header["seen"], header["chain"], arrays)

    def refusal(self, made_from: str) -> CalibrationError:
        """Return the error for a state that cannot be continued."""
        return CalibrationError(
            f"{self.path} is the state of a calibration made from {made_from}. Start that one "
            "again to finish it, or delete the file to start again."
        )
