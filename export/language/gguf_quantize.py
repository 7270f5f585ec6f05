"""Quantize a GGUF file with llama.cpp, and report the tensors that fell back to a larger type.

Q4_K_M works on blocks of 256 columns. A matrix of another width falls back to a type with blocks of
32, which is larger and slower, or to float16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Literal

import gguf

from engines.errors import CheckpointError
from engines.manifest import LanguageModel
from export.checkpoint.llava import Checkpoint
from export.language.gguf_decoder import write_gguf
from runtime.backends.llama_library import load_llama_library, take_log

GgufPrecision = Literal["f32", "f16", "q8_0", "q4_k_m"]

Quantized = Literal["q8_0", "q4_k_m"]

_FILE_TYPES: dict[Quantized, gguf.LlamaFileType] = {
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
_SHRINKS_TO: dict[Quantized, float] = {"q8_0": 0.53, "q4_k_m": 0.31}
"""A file's size in these, as a share of float16; about."""
_WATCH_EVERY_S = 1.0
_BLOCK_COLUMNS: dict[Quantized, int] = {"q8_0": 32, "q4_k_m": 256}


@dataclass(frozen=True)
class Fallback:
    """A matrix whose width does not fit the blocks of the precision asked for.

    Attributes:
        tensor: its name in the GGUF file.
        columns: its width.
        dtype: what it became, for example ``"Q5_0"``.
    """

    tensor: str
    columns: int
    dtype: str


@dataclass(frozen=True)
class GgufDecoder:
    """What was written.

    Attributes:
        model: what the manifest says of it.
        fallbacks: tensors that are larger than the precision promises.
    """

    model: LanguageModel
    fallbacks: tuple[Fallback, ...]

    def describe_fallbacks(self) -> str:
        """Return one sentence for the build's log; empty when every tensor fits."""
        if not self.fallbacks:
            return ""
        kinds = sorted({(each.columns, each.dtype) for each in self.fallbacks})
        told = ", ".join(f"{columns} columns -> {dtype}" for columns, dtype in kinds)
        return (
            f"{len(self.fallbacks)} matrices do not fit the blocks of {self.model.precision} "
            f"and are stored larger ({told})."
        )


def export_gguf(
    checkpoint: Checkpoint,
    root: Path,
    precision: GgufPrecision,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufDecoder:
    """Write the language model for llama.cpp into a bundle.

    Args:
        checkpoint: an opened LLaVA checkpoint.
        root: the bundle's directory, while it is being written.
        precision: ``"q4_k_m"`` (about 4.8 bits a weight), ``"q8_0"``, ``"f16"``, or ``"f32"``
            (exact, to compare with).
        progress: called with the bytes written and the bytes there will be, about.

    Raises:
        CheckpointError: llama.cpp cannot run this language model, or could not quantize it.
        BackendError: llama-cpp-python is not installed; f16 and f32 do not need it.
    """
    model = LanguageModel(
        backend="llamacpp", file=f"llm/llamacpp/model-{precision}.gguf", precision=precision
    )
    file = root / model.file
    if precision == "f16" or precision == "f32":  # noqa: PLR1714, which mypy cannot narrow by
        write_gguf(checkpoint, file, precision, progress)
        return GgufDecoder(model, ())
    whole = file.with_name(".model-f16.gguf")
    try:
        write_gguf(
            checkpoint,
            whole,
            progress=lambda done, total: progress(done, int(total * (1 + _SHRINKS_TO[precision]))),
        )
        half_bytes = whole.stat().st_size
        expected = int(half_bytes * _SHRINKS_TO[precision])
        with _watch_file(
            _unfinished(file),
            lambda size: progress(half_bytes + min(size, expected), half_bytes + expected),
        ):
            quantize_gguf(whole, file, precision)
    finally:
        whole.unlink(missing_ok=True)
    return GgufDecoder(model, read_fallbacks(file, precision))


def quantize_gguf(source: Path, destination: Path, precision: Quantized) -> None:
    """Quantize a float16 GGUF file with llama.cpp.

    Raises:
        BackendError: llama-cpp-python is not installed.
        CheckpointError: llama.cpp refused; its own words are in the message.
    """
    library = load_llama_library()
    options = library.llama_model_quantize_default_params()
    options.ftype = int(_FILE_TYPES[precision])
    options.nthread = os.cpu_count() or 1
    unfinished = _unfinished(destination)
    take_log()
    try:
        status = library.llama_model_quantize(os.fsencode(source), os.fsencode(unfinished), options)
        if status != 0:
            raise CheckpointError(
                f"llama.cpp could not quantize {source} to {precision} ({take_log()}). Check that "
                "the disk has room, or build with --llm-precision f16."
            )
        unfinished.replace(destination)
    finally:
        unfinished.unlink(missing_ok=True)


def read_fallbacks(file: Path, precision: Quantized) -> tuple[Fallback, ...]:
    """Return the matrices of a GGUF file whose width does not fit a precision's blocks."""
    block = _BLOCK_COLUMNS[precision]
    return tuple(
        Fallback(tensor.name, int(tensor.shape[0]), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(file).tensors
        if len(tensor.shape) > 1 and int(tensor.shape[0]) % block
    )


def _unfinished(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.part")


@contextmanager
def _watch_file(file: Path, tell: Callable[[int], None]) -> Iterator[None]:
    """Tell the size of a file that grows, while llama.cpp, which says nothing, writes it."""
    done = Event()

    def watch() -> None:
        while not done.wait(_WATCH_EVERY_S):
            if file.exists():
                tell(file.stat().st_size)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
