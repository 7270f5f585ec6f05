"""Run the ONNX decoder with OpenVINO, on the CPU of an x86 board.

It is the file that ONNX Runtime runs. Quantized products take INT8 activations, or BF16 on a CPU
with AMX. The cache belongs to OpenVINO: a rewind hands back its beginning, a fork copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.cpu_flags import has_amx
from engines.errors import BackendError
from engines.graph_contents import MICROSOFT_DOMAIN, ONNX_DOMAINS, check_graph_contents
from engines.memory.context_length import ContextNeed
from runtime.backends import IN_PROCESS
from runtime.backends.context_choice import choose_context_length
from runtime.backends.decoder_backend import DecoderBackend
from runtime.backends.rows import require_finite, rows_from_parts
from runtime.backends.stateful_graph import (
    EMBEDDINGS,
    LOGITS,
    MASK,
    ORDER,
    POSITIONS,
    make_stateful,
)
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Bias, Embeddings, Logits, Part, Positions

_PREFILL_CHUNK = 1024
"""Positions per run: what a layer computes of them is in memory at once."""


@dataclass(frozen=True)
class Decoder:
    """A compiled decoder, shared by a conversation and its forks.

    Attributes:
        compiled: the graph.
        table: text embeddings.
        most_positions: that the model was trained for.
        openvino: the module.
    """

    compiled: Any
    table: EmbeddingTable
    most_positions: int
    openvino: Any


class OpenVinoBackend(DecoderBackend[Decoder]):
    """One conversation with a decoder that OpenVINO runs; see `LanguageBackend`."""

    name = "openvino"
    capabilities = IN_PROCESS

    def __init__(self, decoder: Decoder, context_length: int) -> None:
        super().__init__(decoder, context_length)
        self._request: Any = decoder.compiled.create_infer_request()
        self._held = 0  # places filled in OpenVINO's cache: more than `position` after a rewind

    def prefill(
        self, parts: Sequence[Part], positions: Positions | None = None, bias: Bias | None = None
    ) -> Logits:
        """Append parts and return the logits after the last one; see `DecoderBackend`."""
        table = self._open_decoder().table
        rows = rows_from_parts(parts, table)  # [N, D]
        positions, bias = self._standing_of(len(rows), positions, bias)
        self._forget_what_was_rewound()
        for start in range(0, len(rows), _PREFILL_CHUNK):
            chunk = slice(start, start + _PREFILL_CHUNK)
            self._append(rows[chunk], positions[chunk], bias[chunk])
        logits: Logits = self._request.get_tensor(LOGITS).data[0, 0, : table.vocabulary]  # [V]
        return require_finite(logits.astype(np.float32), self.position)

    def fork(self) -> OpenVinoBackend:
        """Return a second conversation that starts with a copy of this one's cache."""
        decoder = self._open_decoder()
        copy = OpenVinoBackend(decoder, self.context_length)
        if self.position:
            copy._fill({state.name: self._rows_of(state) for state in self._request.query_state()})
        copy._positions, copy._bias, copy._held = self._positions, self._bias, self.position
        return copy

    def close(self) -> None:
        """Free the cache, and the model once no fork uses it; calling it again does nothing."""
        super().close()
        self._request = None

    def _append(self, rows: Embeddings, positions: Positions, bias: Bias) -> None:
        """Run the graph over rows[N, D] that stand at positions[N] and have bias[N]."""
        biases = np.concatenate([self._bias, bias])
        inputs: dict[str, NDArray[Any]] = {
            EMBEDDINGS: np.ascontiguousarray(rows[None], np.float32),  # [1, N, D]
            MASK: _causal_mask(np.arange(self.position, self.position + len(rows)), biases),
            POSITIONS: positions,
            ORDER: np.zeros(1, np.int32),
        }
        try:
            self._request.infer(inputs, share_inputs=True)
        except RuntimeError as error:
            self._held = -1  # nobody knows how much was written
            raise BackendError(
                f"OpenVINO failed on {len(rows)} positions after {self.position} "
                f"({_one_line(error)}). If memory ran out, open the backend with a smaller context "
                "(--context)."
            ) from error
        self._positions, self._bias = np.concatenate([self._positions, positions]), biases
        self._held = self.position

    def _forget_what_was_rewound(self) -> None:
        if self._held == self.position:
            return
        if self.position:
            self._fill({state.name: self._rows_of(state) for state in self._request.query_state()})
        else:
            self._request.reset_state()
        self._held = self.position

    def _rows_of(self, state: Any) -> NDArray[np.float32]:
        """Return a copy of a cache tensor's filled places, float32[1, heads, filled, width]."""
        held: NDArray[np.float32] = state.state.data
        return np.ascontiguousarray(held[:, :, : self.position])

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
    most = bundle.manifest.text.context_length
    decoder = Decoder(compiled, EmbeddingTable(bundle), most, openvino)
    opened = OpenVinoBackend(decoder, context_length)
    # OpenVINO packs the weights when it first needs them, which takes seconds: not in an answer.
    opened.prefill([np.zeros((1, opened.hidden_size), np.float32)])
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


def _causal_mask(places: NDArray[np.int64], bias: Bias) -> NDArray[np.float32]:
    """Return what is added to the scores of attention: the bias, or minus infinity.

    Args:
        places: int64[N], the last ones of the cache that are filled.
        bias: float32[last place + 1].

    Returns:
        float32[1, 1, N, last place + 1].
    """
    later = np.arange(len(bias))[None] > places[:, None]  # [N, last + 1]
    mask: NDArray[np.float32] = np.where(later, np.float32(-np.inf), bias)[None, None]
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
