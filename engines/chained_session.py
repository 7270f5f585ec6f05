"""Run the tower, a budget's reducer and the projector one after the other, as one `Session`.

What passes between them stays on the device. The tower and the projector may serve several chains,
one for each budget, so that their weights are loaded once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from engines.errors import EngineError
from engines.session import Array, Stage


@dataclass(frozen=True)
class SharedStages:
    """What several chains have in common.

    Attributes:
        tower: runs first.
        projector: runs last.
        turn: chains take turns, since a stage hands on buffers of its own.
    """

    tower: Stage
    projector: Stage
    turn: threading.Lock = field(default_factory=threading.Lock)


class ChainedSession(AbstractContextManager["ChainedSession"]):
    """Three stages as one session.

    Attributes:
        shared: the tower and the projector, which other chains may use while this one is open.
    """

    def __init__(self, shared: SharedStages, reducer: Stage, *, owns_shared: bool) -> None:
        """Put the stages together.

        Args:
            shared: the first and the last.
            reducer: the one between.
            owns_shared: close them with this.
        """
        self.shared = shared
        self._reducer: Stage | None = reducer
        self._owns_shared = owns_shared
        handed = {*shared.projector.input_names}
        names = [name for name in reducer.output_names if name not in handed]
        self._output_names = (*shared.projector.output_names, *names)

    @property
    def provider(self) -> str:
        """What runs the stages."""
        return self.shared.tower.provider

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names `run` takes."""
        return self.shared.tower.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names `run` returns."""
        return self._output_names

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stages once; the arrays returned belong to the caller.

        More rows than a plan takes at once are run in several parts.

        Raises:
            EngineError: a name, shape or dtype is not what the tower takes, a run failed, or this
                session or the one that owns the tower is closed.
        """
        rows = len(next(iter(inputs.values()))) if inputs else 0
        most = self.shared.tower.most_rows or max(rows, 1)
        with self.shared.turn:
            if self._reducer is None:
                raise EngineError("The session is closed; open it again to run it.")
            parts = [
                self._run_part(
                    {name: array[first : first + most] for name, array in inputs.items()},
                    self._reducer,
                )
                for first in range(0, max(rows, 1), most)
            ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.output_names}

    def _run_part(self, inputs: Mapping[str, Array], reducer: Stage) -> dict[str, Array]:
        seen = self.shared.tower.advance(inputs)
        left = reducer.advance({name: seen[name] for name in reducer.input_names})
        projector = self.shared.projector
        made = projector.advance({name: left.pop(name) for name in projector.input_names})
        return projector.fetch(made) | reducer.fetch(left)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is this one's own; calling it again does nothing."""
        with self.shared.turn:
            if self._reducer is None:
                return
            self._reducer.close()
            self._reducer = None
            if self._owns_shared:
                self.shared.projector.close()
                self.shared.tower.close()
