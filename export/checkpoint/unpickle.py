"""A pickled file of weights becomes safetensors, in a process of its own.

Enters: a `.bin`, `.pt` or `.pth` file that PyTorch wrote. Leaves: its tensors in a safetensors
file. A pickle is a program. PyTorch's reader for weights runs none of it but the making of tensors
and of plain containers, and refuses the rest; it runs in a child process that ends with the file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError

PICKLED = (".bin", ".pt", ".pth")
_LAST_CHARACTERS = 600


def unpickle(source: Path, destination: Path) -> None:
    """Write the tensors of a pickled file as safetensors.

    Raises:
        CheckpointError: the file holds something else than tensors, or is damaged.
    """
    command = [sys.executable, "-m", "export.checkpoint.unpickle", str(source), str(destination)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-_LAST_CHARACTERS:]
        raise CheckpointError(
            f"{source}: its tensors cannot be read without running its code, or it is damaged "
            f"(exit status {done.returncode}: {said}). Take safetensors from the publisher, or a "
            "file that holds a state_dict only."
        )


def _convert(source: Path, destination: Path) -> None:
    import torch
    from safetensors.torch import save_file

    content: Any = torch.load(source, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    strange = not isinstance(content, dict) or [
        name
        for name, tensor in content.items()
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor)
    ]
    if strange:
        raise SystemExit(f"holds something else than a dictionary of tensors: {strange!r:.200}")
    # A clone of each: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in content.items()}
    save_file(tensors, destination, metadata={"format": "pt"})


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
