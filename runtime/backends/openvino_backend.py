"""Run the ONNX decoder with OpenVINO, on the CPU of an x86 board.

It is the file that ONNX Runtime runs. Quantized products take INT8 activations, or BF16 on a CPU
with AMX. The cache belongs to OpenVINO: a rewind hands back its beginning, a fork copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.cpu_flags import has_amx
from engines.errors import BackendError
from engines.graph_contents import MICROSOFT_DOMAIN, ONNX_DOMAINS, check_graph_contents
from engines.memory.context_length import ContextNeed
from runtime.backends import IN_PROCESS, Capabilities
from runtime.backends.context_choice import choose_context_length
from runtime.backends.decoder_backend import DecoderBackend
from runtime.backends.rows import require_finite, require_room, rows_from_parts
from runtime.backends.stateful_graph import (
    EMBEDDINGS,
    LOGITS,
    MASK,
    ORDER,
    POSITIONS,
    make_stateful,
)
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Embeddings, Logits, Part

_PREFILL_CHUNK = 1024
"""Positions per run: what a layer computes of them is in memory at once."""


@dataclass(frozen=True)
class Decoder:
    """A compiled decoder, shared by a conversation and its forks.

    Attributes:
        compiled: the graph.
        table: text embeddings.
        openvino: the module.
    """

    compiled: Any
    table: EmbeddingTable
    openvino: Any


class OpenVinoBackend(DecoderBackend[Decoder]):
    """One conversation with a decoder that OpenVINO runs; see `LanguageBackend`."""

    name = "openvino"
    capabilities: ClassVar[Capabilities] = IN_PROCESS

    def __init__(self, decoder: Decoder, context_length: int) -> None:
        super().__init__(decoder, context_length)
        self._request: Any = decoder.compiled.create_infer_request()
        self._held = 0  # positions in OpenVINO's cache: more than `_position` after a rewind

    def prefill(self, parts: Sequence[Part]) -> Logits:
        """Append parts and return the logits after the last one, float32[V].

        Raises:
            BackendError: wrong hidden size, more positions than the context holds, or logits that
                are not numbers.
        """
        table = self._open_decoder().table
        rows = rows_from_parts(parts, table)  # [N, D]
        require_room(self._position, len(rows), self.context_length)
        self._forget_what_was_rewound()
        for start in range(0, len(rows), _PREFILL_CHUNK):
            self._append(rows[start : start + _PREFILL_CHUNK])
        logits: Logits = self._request.get_tensor(LOGITS).data[0, 0, : table.vocabulary]  # [V]
        return require_finite(logits.astype(np.float32), self._position)

    def fork(self) -> OpenVinoBackend:
        """Return a second conversation that starts with a copy of this one's cache."""
        decoder = self._open_decoder()
        copy = OpenVinoBackend(decoder, self.context_length)
        if self._position:
            copy._fill({state.name: self._rows_of(state) for state in self._request.query_state()})
        copy._position = copy._held = self._position
        return copy

    def close(self) -> None:
        """Free the cache, and the model once no fork uses it; calling it again does nothing."""
        super().close()
        self._request = None

    def _append(self, rows: Embeddings) -> None:
        """Run the graph over rows[N, D] and move the position on."""
        end = self._position + len(rows)
        positions = np.arange(self._position, end)
        inputs: dict[str, NDArray[Any]] = {
            EMBEDDINGS: np.ascontiguousarray(rows[None], np.float32),  # [1, N, D]
            MASK: _causal_mask(positions),
            POSITIONS: positions,
            ORDER: np.zeros(1, np.int32),
        }
        try:
            self._request.infer(inputs, share_inputs=True)
        except RuntimeError as error:
            self._held = -1  # nobody knows how much was written
            raise BackendError(
                f"OpenVINO failed on {len(rows)} positions after {self._position} "
                f"({_one_line(error)}). If memory ran out, open the backend with a smaller context "
                "(--context)."
            ) from error
        self._position = self._held = end

    def _forget_what_was_rewound(self) -> None:
        if self._held == self._position:
            return
        if self._position:
            self._fill({state.name: self._rows_of(state) for state in self._request.query_state()})
        else:
            self._request.reset_state()
        self._held = self._position

    def _rows_of(self, state: Any) -> NDArray[np.float32]:
        """Return a copy of a cache tensor's positions, float32[1, heads, position, width]."""
        held: NDArray[np.float32] = state.state.data
        return np.ascontiguousarray(held[:, :, : self._position])

    def _fill(self, rows: dict[str, NDArray[np.float32]]) -> None:
        """Make the cache hold these rows and no more."""
        tensor = self._open_decoder().openvino.Tensor
        for state in self._request.query_state():
            state.state = tensor(rows[state.name])


def open_openvino_backend(
    bundle: Bundle,
    *,
    threads: int | None = None,
    context_length: int | None = None,
    need: ContextNeed = ContextNeed(),
) -> OpenVinoBackend:
    """Load a bundle's ONNX decoder.

    Args:
        bundle: an opened bundle.
        threads: CPU threads; by default one per physical core.
        context_length: positions the KV cache holds; by default what ``need`` asks for.
        need: what the cache has to hold.

    Raises:
        OptionError: the bundle has no ONNX decoder.
        BundleError: the decoder holds what our exporters never write.
        BackendError: OpenVINO is not installed or cannot run it, or a context length the model was
            not trained for.
    """
    described = bundle.language_model(OpenVinoBackend.name)
    context_length = choose_context_length(bundle, context_length, need)
    openvino = _import_openvino()
    check_graph_contents(bundle, described.file, (*ONNX_DOMAINS, MICROSOFT_DOMAIN))
    file = bundle.path(described.file)
    settings = _settings(described.precision)
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = _compile(openvino, file, settings)
    opened = OpenVinoBackend(Decoder(compiled, EmbeddingTable(bundle), openvino), context_length)
    # OpenVINO packs the weights when it first needs them, which takes seconds: not in an answer.
    opened._append(np.zeros((1, opened.hidden_size), np.float32))
    opened.rewind(0)
    return opened


def _settings(precision: str) -> dict[str, Any]:
    """Return OpenVINO's settings for a decoder of that precision; fp32 is computed exactly."""
    exact = precision == "fp32"
    dtype = "bf16" if has_amx() and not exact else "f32"
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": dtype,
        "KV_CACHE_PRECISION": dtype,  # 8 bits prefill slower, and would be rounded at each rewind
    }
    return settings | ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if exact else {})


def _compile(openvino: Any, file: Path, settings: dict[str, Any]) -> Any:
    core = openvino.Core()
    try:
        graph = make_stateful(openvino, core.read_model(file), str(file))
        return core.compile_model(graph.model, "CPU", settings)
    except RuntimeError as error:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
        raise BackendError(
            f"{file} ({size}) is not a decoder that OpenVINO {openvino.__version__} can run: "
            f"{_one_line(error)[-600:]} Build the bundle again, or run it with ONNX Runtime: "
            "--backend ort."
        ) from error


def _causal_mask(positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return what each row may see, 0 or minus infinity, float32[1, 1, N, last position + 1]."""
    later = np.arange(positions[-1] + 1)[None] > positions[:, None]  # [N, last + 1]
    mask = np.zeros((1, 1, *later.shape), np.float32)
    mask[0, 0, later] = -np.inf
    return mask


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"The backend 'openvino' needs OpenVINO, which is not installed ({error}). Install it "
            "with `pip install 'foveate[openvino]'`, or use --backend ort."
        ) from error
    return openvino


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
