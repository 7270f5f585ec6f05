"""Run the ONNX decoder with ONNX Runtime and one KV cache that is not copied.

The cache is allocated once and bound as past and as present, so GroupQueryAttention appends in
place. Only the logits are read. A rewind goes back in the cache, and what lies beyond is
overwritten. The graph is given the position of everything in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BackendError
from engines.graph_contents import MICROSOFT_DOMAIN, ONNX_DOMAINS, check_graph_contents
from engines.llm_words import LlmDevice
from engines.memory.context_length import ContextNeed
from engines.ort import CPU, CUDA, create_inference_session
from runtime.backends import IN_PROCESS
from runtime.backends.context_choice import choose_context_length
from runtime.backends.decoder_backend import DecoderBackend
from runtime.backends.rows import require_finite, rows_from_parts
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Bias, Embeddings, Logits, Part, Positions

if TYPE_CHECKING:
    import onnxruntime as ort

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
POSITIONS_INPUT = "cache_positions"
"""The graph's input int64[past + N]: where everything in the cache stands, new rows included."""
BIAS_INPUT = "attention_bias"
"""The graph's input float[1, 1, N, past + N], added to the scores of attention."""
_PREFILL_CHUNK = 512
"""Positions per run: attention scores grow with its product with the context length."""


@dataclass(frozen=True)
class Decoder:
    """A loaded decoder graph, shared by a conversation and its forks.

    Attributes:
        session: the graph.
        table: text embeddings.
        device: where it runs.
        dtype: of `inputs_embeds`, the logits and the cache.
        caches: input name -> output name of every cache tensor.
        cache_shape: key-value heads and the width of one.
        padded_vocabulary: width of the logits; those past the vocabulary are padding.
        most_positions: that the model was trained for.
        takes_positions: the graph has `POSITIONS_INPUT`; those of older bundles have not.
        takes_bias: it has `BIAS_INPUT`; those for a GPU have not.
    """

    session: ort.InferenceSession
    table: EmbeddingTable
    device: LlmDevice
    dtype: np.dtype[Any]
    caches: dict[str, str]
    cache_shape: tuple[int, int]
    padded_vocabulary: int
    most_positions: int
    takes_positions: bool
    takes_bias: bool


class OrtBackend(DecoderBackend[Decoder]):
    """One conversation with a decoder that ONNX Runtime runs; see `LanguageBackend`."""

    name = "ort"

    def __init__(self, decoder: Decoder, context_length: int) -> None:
        super().__init__(decoder, context_length)
        self.capabilities = replace(
            IN_PROCESS, positions=decoder.takes_positions, bias=decoder.takes_bias
        )
        self._logits = np.zeros((1, 1, decoder.padded_vocabulary), decoder.dtype)
        self._mask, self._cache = _allocate(decoder, context_length)
        self._binding, self._device_cache = _bind(decoder, self._cache, self._logits)

    def prefill(
        self, parts: Sequence[Part], positions: Positions | None = None, bias: Bias | None = None
    ) -> Logits:
        """Append parts and return the logits after the last one; see `DecoderBackend`."""
        table = self._open_decoder().table
        rows = rows_from_parts(parts, table)  # [N, D]
        positions, bias = self._standing_of(len(rows), positions, bias)
        for start in range(0, len(rows), _PREFILL_CHUNK):
            chunk = slice(start, start + _PREFILL_CHUNK)
            self._append(rows[chunk], positions[chunk], bias[chunk])
        logits = self._logits[0, 0, : table.vocabulary].astype(np.float32)  # [V]
        return require_finite(logits, self.position)

    def fork(self) -> OrtBackend:
        """Return a second conversation that starts with a copy of this one's cache."""
        copy = OrtBackend(self._open_decoder(), self.context_length)
        for name, mine in self._cache.items():
            if name in self._device_cache:
                copy._device_cache[name].update_inplace(self._device_cache[name].numpy())
            else:
                copy._cache[name][:, :, : self.position] = mine[:, :, : self.position]
        copy._positions, copy._bias = self._positions, self._bias
        return copy

    def close(self) -> None:
        """Free the cache, and the model once no fork uses it; calling it again does nothing."""
        super().close()
        self._binding = None
        self._cache = {}
        self._device_cache = {}

    def _append(self, rows: Embeddings, positions: Positions, bias: Bias) -> None:
        """Run the graph over rows[N, D] that stand at positions[N] and have bias[N]."""
        decoder = self._open_decoder()
        filled = np.concatenate([self._positions, positions])
        biases = np.concatenate([self._bias, bias])
        inputs: dict[str, NDArray[Any]] = {
            "inputs_embeds": rows[None].astype(decoder.dtype, copy=False),  # [1, N, D]
            "attention_mask": self._mask[:, : len(filled)],  # [1, past + N]
        }
        if decoder.takes_positions:
            inputs[POSITIONS_INPUT] = filled
        if decoder.takes_bias:
            inputs[BIAS_INPUT] = np.tile(biases, (1, 1, len(rows), 1))
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, value)
        try:
            decoder.session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on {len(rows)} positions after {self.position} "
                f"({_first_line(error)}). If memory ran out, open the backend with a smaller "
                "context (--context)."
            ) from error
        self._positions, self._bias = filled, biases


def open_ort_backend(
    bundle: Bundle,
    *,
    threads: int | None = None,
    device: LlmDevice | None = None,
    context_length: int | None = None,
    need: ContextNeed = ContextNeed(),
) -> OrtBackend:
    """Load a bundle's ONNX decoder.

    Args:
        bundle: an opened bundle.
        threads: CPU threads; by default one per physical core.
        device: ``"cpu"`` or ``"cuda"``; by default where the decoder was built for.
        context_length: positions the KV cache holds; by default what ``need`` asks for.
        need: what the KV cache has to hold.

    Raises:
        OptionError: the bundle has no decoder for ONNX Runtime.
        EngineError: this machine cannot load it.
        BundleError: the decoder holds what our exporters never write.
        BackendError: a context length the model was not trained for, or a decoder for another
            device.
    """
    model = bundle.language_model(OrtBackend.name)
    graph, device = model.file, device or model.device
    check_graph_contents(bundle, graph, (*ONNX_DOMAINS, MICROSOFT_DOMAIN))
    file = bundle.path(graph)
    context_length = choose_context_length(bundle, context_length, need)
    provider = CUDA if device == "cuda" else CPU
    session = create_inference_session(file, threads=threads, providers=[provider])
    return OrtBackend(_read_decoder(session, file, device, bundle), context_length)


def _read_decoder(
    session: ort.InferenceSession, file: Path, device: LlmDevice, bundle: Bundle
) -> Decoder:
    """Read names, shapes and dtypes from the graph; refuse one that is no decoder of ours."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    caches = {
        name: name.replace("past_key_values.", "present.")
        for name in inputs
        if name.startswith("past_key_values.")
    }
    shapes = {tuple(inputs[name].shape[1::2]) for name in caches}
    expected = {"inputs_embeds", "attention_mask", *caches}
    shape = shapes.pop() if len(shapes) == 1 else ()
    fits = set(inputs) - {POSITIONS_INPUT, BIAS_INPUT} == expected
    fits &= {"logits", *caches.values()} <= set(outputs)
    if not fits or len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        raise BackendError(
            f"{file} is not a decoder that export.build wrote: expected the inputs inputs_embeds, "
            f"attention_mask and past_key_values.* of one known shape, got "
            f"{', '.join(inputs)}. Build the bundle again."
        )
    dtype = _DTYPES[inputs["inputs_embeds"].type]
    if (dtype == np.float16) != (device == "cuda"):
        built_for = "a GPU" if dtype == np.float16 else "the CPU"
        raise BackendError(
            f"{file} computes in {dtype}, which is for {built_for}. Run it there (--llm-device), "
            f"or build one for what you have: export.build --llm-device {device}."
        )
    return Decoder(
        session=session,
        table=EmbeddingTable(bundle),
        device=device,
        dtype=dtype,
        caches=caches,
        cache_shape=(int(shape[0]), int(shape[1])),
        padded_vocabulary=int(outputs["logits"].shape[-1]),
        most_positions=bundle.manifest.text.context_length,
        takes_positions=POSITIONS_INPUT in inputs,
        takes_bias=BIAS_INPUT in inputs,
    )


def _allocate(
    decoder: Decoder, context_length: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Return an attention mask and a cache of ``context_length`` positions.

    Zeros come from the operating system: no memory is taken until a position is written.

    Raises:
        BackendError: they are more than the system can ever give.
    """
    heads, head_size = decoder.cache_shape
    shape = (1, heads, context_length, head_size)
    try:
        cache = {name: np.zeros(shape, decoder.dtype) for name in decoder.caches}
        return np.ones((1, context_length), np.int64), cache
    except (MemoryError, ValueError) as error:  # ValueError: more than an address can count
        needed = len(decoder.caches) * context_length * heads * head_size * decoder.dtype.itemsize
        raise BackendError(
            f"A cache of {context_length} positions takes {needed / 1e9:.1f} GB, which this "
            "machine does not have. Open the backend with a smaller context (--context)."
        ) from error


def _bind(
    decoder: Decoder, cache: dict[str, NDArray[Any]], logits: NDArray[Any]
) -> tuple[Any, dict[str, Any]]:
    """Bind each cache tensor as past and as present, and the logits to memory we read.

    Returns:
        The binding, and the cache tensors that live on a device.
    """
    from onnxruntime import OrtValue

    binding = decoder.session.io_binding()
    values = {
        name: OrtValue.ortvalue_from_numpy(memory, decoder.device, 0)
        for name, memory in cache.items()
    }
    for past, present in decoder.caches.items():
        binding.bind_ortvalue_input(past, values[past])
        binding.bind_ortvalue_output(present, values[past])
    binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits, "cpu", 0))
    return binding, {} if decoder.device == "cpu" else values


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
