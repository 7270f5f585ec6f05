"""llama.cpp as the language backend: a GGUF decoder, on the CPU or with layers on a GPU.

Enters: parts of a prompt. Leaves: the logits after the last position. Text and visual tokens both
enter as embedding rows, so the numbers do not depend on how the GGUF file quantized its own table.
A conversation is a sequence of llama.cpp's cache: a rewind removes its tail, and a fork is another
sequence that shares what both have read.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle import Bundle
from engines.errors import BackendError
from engines.manifest import LanguageModel
from runtime.backends import Embeddings, Logits, Part, TokenIds
from runtime.backends.llama_library import BUILD_HINT, load_llama_library, take_log, uses_amx
from runtime.backends.rows import require_rewind, require_room, rows_from_parts
from runtime.embeddings import EmbeddingTable

_PREFILL_CHUNK = 512
_MOST_CONVERSATIONS = 8
_DEFAULT_CONTEXT_LENGTH = 4096
"""llama.cpp takes the cache's memory at once, so by default not all a long-context model allows."""
_GGUF_MAGIC = b"GGUF"
_log = logging.getLogger(__name__)


class LlamaCppBackend:
    """One conversation with a decoder that llama.cpp runs; see `LanguageBackend`.

    A conversation and its forks share one cache of ``context_length`` positions: what they have in
    common is held once, and what each adds is counted together.
    """

    name = "llamacpp"

    def __init__(self, decoder: LlamaDecoder, sequence: int, position: int = 0) -> None:
        self.context_length = decoder.context_length
        self.hidden_size = decoder.table.hidden_size
        self._decoder: LlamaDecoder | None = decoder
        self._sequence = sequence
        self._position = position

    @property
    def position(self) -> int:
        """Positions filled so far."""
        return self._position

    def embed(self, ids: TokenIds) -> Embeddings:
        """Return the embedding rows of token ids, float32[N, D]."""
        return self._open_decoder().table.rows(ids)

    def prefill(self, parts: Sequence[Part]) -> Logits:
        """Append parts and return the logits after the last one, float32[V].

        All of them or, when it fails, none: the conversation goes on from where it was.

        Raises:
            BackendError: wrong hidden size, or more positions than the context holds.
        """
        decoder = self._open_decoder()
        rows = rows_from_parts(parts, decoder.table)  # [N, D]
        require_room(self._position, len(rows), self.context_length)
        try:
            for start in range(0, len(rows), _PREFILL_CHUNK):
                chunk = rows[start : start + _PREFILL_CHUNK]
                decoder.append(chunk, self._sequence, self._position + start)
        except BackendError:
            decoder.forget(self._sequence, self._position)
            raise
        self._position += len(rows)
        return decoder.last_logits()

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, float32[V]."""
        return self.prefill([np.array([token], np.int64)])

    def rewind(self, position: int) -> None:
        """Forget everything from ``position`` on."""
        require_rewind(position, self._position)
        self._open_decoder().forget(self._sequence, position)
        self._position = position

    def fork(self) -> LlamaCppBackend:
        """Return a second conversation that starts with a copy of this one's cache.

        Raises:
            BackendError: eight conversations are open already.
        """
        decoder = self._open_decoder()
        copy = decoder.start_sequence()
        decoder.share(self._sequence, copy)
        return LlamaCppBackend(decoder, copy, self._position)

    def close(self) -> None:
        """Free the cache, and the model once no fork uses it; calling it again does nothing."""
        if self._decoder is not None:
            self._decoder.end_sequence(self._sequence)
            self._decoder = None

    def _open_decoder(self) -> LlamaDecoder:
        if self._decoder is None:
            raise BackendError("This conversation was closed. Open the backend again.")
        return self._decoder


class LlamaDecoder:
    """A loaded GGUF file with its cache, shared by a conversation and its forks.

    Attributes:
        table: text embeddings.
        context_length: positions the cache holds, of all conversations together.
    """

    def __init__(
        self,
        file: Path,
        table: EmbeddingTable,
        *,
        context_length: int,
        threads: int,
        gpu_layers: int = 0,
        exact: bool = False,
    ) -> None:
        """Load the model and allocate its cache.

        Args:
            file: the GGUF file.
            table: text embeddings.
            context_length: positions the cache holds.
            threads: CPU threads.
            gpu_layers: layers that run on the GPU; -1 is all.
            exact: keep the cache in float32 instead of float16.

        Raises:
            BackendError: llama.cpp cannot, for example because the file is damaged.
        """
        self.table = table
        self.context_length = context_length
        self._library = load_llama_library()
        self._context: Any = None
        self._batch: Any = None
        self._free = list(range(_MOST_CONVERSATIONS))
        self._model = self._load(file, gpu_layers)
        try:
            self._check(file)
            self._context = self._allocate(threads, exact)
            self._memory = self._library.llama_get_memory(self._context)
            self._batch = self._library.llama_batch_init(_PREFILL_CHUNK, table.hidden_size, 1)
        except BackendError:
            self._close()
            raise

    def append(self, rows: Embeddings, sequence: int, position: int) -> None:
        """Run the model over rows[N, D] of a sequence, N at most 512.

        Raises:
            BackendError: the cache is full, or llama.cpp failed.
        """
        batch, count = self._batch, len(rows)
        rows = np.ascontiguousarray(rows, np.float32)
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        for index in range(count):
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index == count - 1
        batch.n_tokens = count
        status = self._library.llama_decode(self._context, batch)
        if status == 1:
            raise BackendError(
                f"The cache of {self.context_length} positions is full: forked conversations share "
                f"it, and {count} more do not fit. Close forks that are done, or open the backend "
                "with a larger context_length."
            )
        if status != 0:
            raise BackendError(
                f"llama.cpp failed on {count} positions after {position} (status {status}: "
                f"{take_log()}). If memory ran out, open the backend with a smaller context_length."
            )

    def last_logits(self) -> Logits:
        """Return the logits of the last position that was run, float32[V]."""
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        logits: Logits = np.ctypeslib.as_array(pointer, (self.table.vocabulary,)).copy()
        return logits

    def forget(self, sequence: int, position: int) -> None:
        """Remove a sequence's positions from ``position`` on."""
        self._library.llama_memory_seq_rm(self._memory, sequence, position, -1)

    def start_sequence(self) -> int:
        """Return a sequence that is not in use.

        Raises:
            BackendError: all are.
        """
        if not self._free:
            raise BackendError(
                f"{_MOST_CONVERSATIONS} conversations share this model already, the most it takes. "
                "Close one that is done before forking."
            )
        return self._free.pop(0)

    def share(self, source: int, destination: int) -> None:
        """Let a new sequence begin with all that another one holds."""
        self._library.llama_memory_seq_cp(self._memory, source, destination, -1, -1)

    def end_sequence(self, sequence: int) -> None:
        """Free a sequence's positions, and the model with the last one."""
        self.forget(sequence, 0)
        self._free.append(sequence)
        if len(self._free) == _MOST_CONVERSATIONS:
            self._close()

    def _load(self, file: Path, gpu_layers: int) -> Any:
        library = self._library
        _require_gguf(file)
        if gpu_layers and not library.llama_supports_gpu_offload():
            raise BackendError(
                f"gpu_layers is {gpu_layers}, and this build of llama-cpp-python has no GPU "
                'support. Reinstall it with CMAKE_ARGS="-DGGML_CUDA=on", or use gpu_layers=0.'
            )
        options = library.llama_model_default_params()
        options.n_gpu_layers = gpu_layers
        if uses_amx(library.llama_print_system_info().decode()):
            options.use_extra_bufts = False
            _log.warning(
                "This build of llama.cpp has AMX kernels, which crash on batches of quantized "
                "weights. They are switched off, and with them other fast kernels; for full speed "
                "rebuild with %s",
                BUILD_HINT,
            )
        take_log()
        model = library.llama_model_load_from_file(os.fsencode(file), options)
        if not model:
            raise BackendError(
                f"{file}: llama.cpp cannot load it ({take_log()}). If the file is damaged, build "
                "the bundle again; if memory is short, use a smaller --llm-precision."
            )
        return model

    def _check(self, file: Path) -> None:
        library, table = self._library, self.table
        vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        found = (vocabulary, library.llama_model_n_embd(self._model))
        if found != (table.vocabulary, table.hidden_size):
            raise BackendError(
                f"{file} is of another model: it has {found[0]} token ids and hidden size "
                f"{found[1]}, and bundle.json says {table.vocabulary} and {table.hidden_size}. "
                "Build the bundle again from one checkpoint."
            )

    def _allocate(self, threads: int, exact: bool) -> Any:
        library = self._library
        options = library.llama_context_default_params()
        options.n_ctx = self.context_length
        options.n_batch = options.n_ubatch = min(_PREFILL_CHUNK, self.context_length)
        options.n_seq_max = _MOST_CONVERSATIONS
        options.kv_unified = True
        if exact:
            options.type_k = options.type_v = library.GGML_TYPE_F32
            options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = threads
        take_log()
        context = library.llama_init_from_model(self._model, options)
        if not context:
            raise BackendError(
                f"llama.cpp cannot allocate a cache of {self.context_length} positions "
                f"({take_log()}). Open the backend with a smaller context_length."
            )
        return context

    def _close(self) -> None:
        library = self._library
        if self._batch is not None:
            library.llama_batch_free(self._batch)
        if self._context is not None:
            library.llama_free(self._context)
        if self._model is not None:
            library.llama_model_free(self._model)
        self._batch = self._context = self._model = None


def open_llamacpp_backend(
    bundle: Bundle,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    context_length: int | None = None,
) -> LlamaCppBackend:
    """Load a bundle's GGUF decoder.

    Args:
        bundle: an opened bundle.
        threads: CPU threads; by default all this process may use.
        gpu_layers: decoder layers that run on the GPU; -1 is all of them.
        context_length: positions the cache holds; by default what the model was trained for, 4096
            at most.

    Raises:
        BackendError: the bundle has no such decoder, or this machine cannot run it.
    """
    text = bundle.manifest.text
    if context_length is None:
        context_length = min(text.context_length, _DEFAULT_CONTEXT_LENGTH)
    if not 1 <= context_length <= text.context_length:
        raise BackendError(
            f"context_length is {context_length}: expected 1 to {text.context_length}, the "
            "positions the language model was trained for."
        )
    model = _find_model(bundle)
    decoder = LlamaDecoder(
        bundle.root / model.file,
        EmbeddingTable(bundle),
        context_length=context_length,
        threads=threads or len(os.sched_getaffinity(0)),
        gpu_layers=gpu_layers,
        exact=model.precision == "f32",
    )
    return LlamaCppBackend(decoder, decoder.start_sequence())


def _find_model(bundle: Bundle) -> LanguageModel:
    models = bundle.manifest.language_models
    for model in models:
        if model.backend == LlamaCppBackend.name:
            return model
    held = ", ".join(model.backend for model in models)
    raise BackendError(
        f"{bundle.root} holds no decoder for the backend 'llamacpp', only for {held}. Choose "
        f"--backend {models[0].backend}, or build it with "
        "`python -m export.build --llm-backend llamacpp`."
    )


def _require_gguf(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise BackendError(
            f"{file} cannot be read ({error.strerror}). Build the bundle again."
        ) from error
    if magic != _GGUF_MAGIC:
        raise BackendError(
            f"{file} is not a GGUF file: it begins with {magic!r}, expected {_GGUF_MAGIC!r}. Build "
            "the bundle again with `python -m export.build --llm-backend llamacpp`."
        )
