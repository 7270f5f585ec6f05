"""Load a GGUF file with llama.cpp, with one cache that its conversations share.

Only this file calls llama.cpp's functions. A failure that llama.cpp reports by a null pointer or a
status becomes an error that says why.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engines.errors import BackendError
from engines.gpu import Gpu, find_gpu
from runtime.backends.llama_library import BUILD_HINT, load_llama_library, take_log, uses_amx
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Embeddings, Logits

BATCH_ROWS = 512
"""Most rows of one call: the attention scores grow with its product with the context length."""
_MOST_SEQUENCES = 8
_GGUF_MAGIC = b"GGUF"
_KEYS = ("key", "value")
_CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "q8": 34 / 32}
_MEMORY_FILE = Path("/proc/meminfo")
_log = logging.getLogger(__name__)


class LlamaDecoder:
    """A loaded GGUF file with its cache, shared by a conversation and its forks.

    Attributes:
        table: text embeddings.
        context_length: positions the cache holds, of all conversations together.
        most_positions: of one of them.
    """

    def __init__(
        self,
        file: Path,
        table: EmbeddingTable,
        *,
        context_length: int,
        threads: int,
        gpu_layers: int | None = None,
        cache: Literal["f16", "q8", "f32"] = "f16",
    ) -> None:
        """Load the model and allocate its cache.

        Args:
            file: the GGUF file.
            table: text embeddings.
            context_length: positions the cache holds.
            threads: CPU threads.
            gpu_layers: layers that run on the GPU, -1 for all; None is all, where there is one.
            cache: how keys and values are kept; float32 is without fused attention.

        Raises:
            BackendError: llama.cpp cannot, for example because the file is damaged.
        """
        self.table = table
        self.context_length = self.most_positions = context_length
        self._library = load_llama_library()
        self._context: Any = None
        self._batch: Any = None
        self._free = list(range(_MOST_SEQUENCES))
        if gpu_layers is None:
            gpu_layers = -1 if self._library.llama_supports_gpu_offload() else 0
        self._model = self._load(file, gpu_layers)
        try:
            self._check(file)
            if not gpu_layers or gpu_shares_memory():
                self._require_memory(cache)
            self._context = self._allocate(threads, cache)
            self._memory = self._library.llama_get_memory(self._context)
            self._batch = self._library.llama_batch_init(BATCH_ROWS, table.hidden_size, 1)
        except BackendError:
            self._close()
            raise

    def append(self, rows: Embeddings, sequence: int, position: int) -> None:
        """Run the model over rows[N, D] of a sequence, N at most `BATCH_ROWS`.

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
                f"{take_log()}). If memory ran out, open the backend with a smaller context "
                "(--context)."
            )

    def last_logits(self) -> Logits:
        """Return the logits of the last position that was run, float32[V].

        Raises:
            BackendError: llama.cpp has none.
        """
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        if not pointer:
            raise BackendError(f"llama.cpp gives no logits ({take_log()}). Open the model again.")
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
                f"{_MOST_SEQUENCES} conversations share this model already, the most it takes. "
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
        if len(self._free) == _MOST_SEQUENCES:
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

    def _require_memory(self, cache: str) -> None:
        """Refuse a cache that this machine cannot hold.

        llama.cpp writes zeros over all of it at once. Linux grants any size and then ends the
        process, or another, for want of memory; so we count first. A Jetson's GPU takes it of the
        same memory.
        """
        layers = self._library.llama_model_n_layer(self._model)
        heads = self._library.llama_model_n_head_kv(self._model)
        architecture = self._describe("general.architecture")
        width = sum(int(self._describe(f"{architecture}.attention.{key}_length")) for key in _KEYS)
        needed = int(self.context_length * layers * heads * width * _CACHE_BYTES[cache])
        available = _available_bytes()
        if available is not None and needed > available:
            raise BackendError(
                f"A cache of {self.context_length} positions takes {needed / 1e9:.1f} GB, and this "
                f"machine has {available / 1e9:.1f} GB free. Open the backend with a smaller "
                "context (--context)."
            )

    def _describe(self, key: str) -> str:
        """Return what the GGUF file says under a key, or nothing."""
        text = ctypes.create_string_buffer(64)
        self._library.llama_model_meta_val_str(self._model, key.encode(), text, len(text))
        return text.value.decode()

    def _allocate(self, threads: int, cache: str) -> Any:
        library = self._library
        options = library.llama_context_default_params()
        options.n_ctx = self.context_length
        options.n_batch = options.n_ubatch = min(BATCH_ROWS, self.context_length)
        options.n_seq_max = _MOST_SEQUENCES
        options.kv_unified = True
        if cache == "f32":
            options.type_k = options.type_v = library.GGML_TYPE_F32
            options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif cache == "q8":  # only fused attention reads a quantized cache
            options.type_k = options.type_v = library.GGML_TYPE_Q8_0
            options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.n_threads = options.n_threads_batch = threads
        take_log()
        context = library.llama_init_from_model(self._model, options)
        if not context:
            raise BackendError(
                f"llama.cpp cannot allocate a cache of {self.context_length} positions "
                f"({take_log()}). Open the backend with a smaller context (--context)."
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


def gpu_shares_memory() -> bool:
    """Return whether this machine's GPU takes the memory of the CPU, as a Jetson's does."""
    gpu = find_gpu()
    return isinstance(gpu, Gpu) and gpu.integrated


def _available_bytes() -> int | None:
    """Return the memory that can be taken without swapping; None where the system does not say."""
    try:
        lines = _MEMORY_FILE.read_text("ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None
