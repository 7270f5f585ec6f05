"""Run a GGUF decoder with llama.cpp, on the CPU or with layers on a GPU.

Text and visual tokens both enter as embedding rows, so the numbers do not depend on how the GGUF
file quantized its own table. A conversation is a sequence of llama.cpp's cache: a rewind removes
its tail, and a fork is another sequence that shares what both have read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from engines.llm_words import KvCache
from engines.memory.context_length import ContextNeed
from runtime.backends import IN_PROCESS
from runtime.backends.context_choice import choose_context_length
from runtime.backends.decoder_backend import DecoderBackend
from runtime.backends.llama_decoder import BATCH_ROWS, LlamaDecoder
from runtime.backends.rows import require_finite, rows_from_parts
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Bias, Logits, Part, Positions

_Q8_BLOCK = 32
"""Numbers of a head that share a scale."""


class LlamaCppBackend(DecoderBackend[LlamaDecoder]):
    """One conversation with a decoder that llama.cpp runs; see `LanguageBackend`.

    A conversation and its forks share one cache of ``context_length`` positions: what they have in
    common is held once, and what each adds is counted together.
    """

    name = "llamacpp"
    # llama.cpp refuses a batch whose positions leave some out, except of M-RoPE models.
    capabilities = replace(IN_PROCESS, apart=False, positions=False, bias=False)

    def __init__(self, decoder: LlamaDecoder, sequence: int) -> None:
        super().__init__(decoder, decoder.context_length)
        self._sequence = sequence

    def prefill(
        self, parts: Sequence[Part], positions: Positions | None = None, bias: Bias | None = None
    ) -> Logits:
        """Append parts and return the logits after the last one; see `DecoderBackend`.

        All of them or, when it fails, none: the conversation goes on from where it was.
        """
        decoder = self._open_decoder()
        rows = rows_from_parts(parts, decoder.table)  # [N, D]
        positions, bias = self._standing_of(len(rows), positions, bias)
        try:
            for start in range(0, len(rows), BATCH_ROWS):
                chunk = rows[start : start + BATCH_ROWS]
                decoder.append(chunk, self._sequence, self.position + start)
        except BackendError:
            decoder.forget(self._sequence, self.position)
            raise
        self._positions = np.concatenate([self._positions, positions])
        self._bias = np.concatenate([self._bias, bias])
        return require_finite(decoder.last_logits(), self.position)

    def rewind(self, position: int) -> None:
        """Forget everything from a place of the cache on."""
        super().rewind(position)
        self._open_decoder().forget(self._sequence, position)

    def fork(self) -> LlamaCppBackend:
        """Return a second conversation that starts with a copy of this one's cache.

        Raises:
            BackendError: eight conversations are open already.
        """
        decoder = self._open_decoder()
        copy = LlamaCppBackend(decoder, decoder.start_sequence())
        decoder.share(self._sequence, copy._sequence)
        copy._positions, copy._bias = self._positions, self._bias
        return copy

    def close(self) -> None:
        """Free the cache, and the model once no fork uses it; calling it again does nothing."""
        if self._decoder is not None:
            self._decoder.end_sequence(self._sequence)
        super().close()


def open_llamacpp_backend(
    bundle: Bundle,
    *,
    threads: int | None = None,
    gpu_layers: int | None = None,
    context_length: int | None = None,
    need: ContextNeed = ContextNeed(),
    kv_cache: KvCache = "f16",
) -> LlamaCppBackend:
    """Load a bundle's GGUF decoder.

    Args:
        bundle: an opened bundle.
        threads: CPU threads; by default all this process may use.
        gpu_layers: decoder layers that run on the GPU, -1 for all; by default all where llama.cpp
            was built with GPU support, as on a Jetson.
        context_length: positions the cache holds; by default what ``need`` asks for.
        need: what the cache has to hold.
        kv_cache: ``"q8"`` keeps keys and values in 8.5 bits.

    Raises:
        OptionError: the bundle has no decoder for llama.cpp, or one whose cache cannot be q8.
        BackendError: this machine cannot run it, or a context length the model was not trained for.
    """
    context_length = choose_context_length(bundle, context_length, need)
    model = bundle.language_model(LlamaCppBackend.name)
    exact = model.precision == "f32"
    if kv_cache == "q8":
        _require_q8(bundle, exact)
    decoder = LlamaDecoder(
        bundle.root / model.file,
        EmbeddingTable(bundle),
        context_length=context_length,
        threads=threads or len(os.sched_getaffinity(0)),
        gpu_layers=gpu_layers,
        cache="f32" if exact else kv_cache,
    )
    return LlamaCppBackend(decoder, decoder.start_sequence())


def _require_q8(bundle: Bundle, exact: bool) -> None:
    """Refuse a cache of 8.5 bits where it cannot be.

    Raises:
        OptionError: the decoder is float32, whose cache is too, or its heads are too narrow.
    """
    if exact:
        raise OptionError(
            "--kv-cache q8: this bundle's GGUF file is float32, and its cache is kept in float32 "
            "as well. Build with --gguf-precision f16, q8_0 or q4_k_m."
        )
    shape = bundle.manifest.text.decoder
    if shape is not None and shape.head_size % _Q8_BLOCK:
        raise OptionError(
            f"--kv-cache q8: llama.cpp quantizes {_Q8_BLOCK} numbers of a head together, and this "
            f"language model's heads have {shape.head_size}. Leave the option out."
        )
