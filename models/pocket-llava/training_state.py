"""Where a training run stands: its resumable state in safetensors, and its log.

Modules, an optimizer and a step enter; files under the run folder leave.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn


class TrainingState:
    """The weights, the optimizer's moments and the step of one stage, in one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, modules: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the state, replacing the last one only once it is complete."""
        tensors = {f"model.{name}": value for name, value in modules.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        whole = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        partial = self.path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, partial, metadata={"step": str(step)})
        partial.replace(self.path)

    def resume(self, modules: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the state if there is one; return the step to continue from."""
        if not self.path.exists():
            return 0
        weights: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        with safe_open(self.path, "pt") as file:
            step = int((file.metadata() or {})["step"])
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                kind, rest = name.split(".", 1)
                if kind == "model":
                    weights[rest] = file.get_tensor(name)
                else:
                    index, moment = rest.split(".")
                    moments.setdefault(int(index), {})[moment] = file.get_tensor(name)
        modules.load_state_dict(weights)
        saved = optimizer.state_dict()
        optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
        return step


class ProgressLog:
    """Running means of the losses: a line on stderr, and the same as JSON in a file."""

    def __init__(self, path: Path, stage: str, every: int = 50) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._stage, self._every = stage, every
        self._means: dict[str, float] = {}
        self._images, self._since = 0, time.monotonic()

    def record(self, step: int, images: int, losses: dict[str, Tensor], note: str) -> None:
        """Take in one step's losses, and write a line every so many steps."""
        for name, value in losses.items():
            last = self._means.get(name, float(value.detach()))
            self._means[name] = 0.96 * last + 0.04 * float(value.detach())
        self._images += images
        if step % self._every:
            return
        rate = self._images / (time.monotonic() - self._since)
        self._images, self._since = 0, time.monotonic()
        means = {name: round(value, 4) for name, value in self._means.items()}
        self.write({"step": step, "note": note, "images_per_s": round(rate, 1), **means})

    def write(self, entry: dict[str, object]) -> None:
        """Write any entry to the log and to stderr."""
        line = json.dumps({"stage": self._stage, **entry})
        print(line, file=self._file, flush=True)
        print(line, file=sys.stderr, flush=True)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights, tied ones once."""
    save_model(module, str(path))


def load_weights(module: nn.Module, path: Path) -> None:
    """Read back what `save_weights` wrote."""
    load_model(module, str(path))
