"""Export the language model to an ONNX decoder that takes embeddings and a KV cache.

It is written to `llm/ort/model.onnx`, with the embedding table as float16 rows that every backend
shares, and the tokenizer. onnxruntime-genai's model builder makes the graph in a process of its
own, because it prints, edits the import path, and needs memory that must be returned.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from safetensors.torch import save_file

from engines.errors import CheckpointError, OptionError
from engines.manifest import DecoderShape, LanguageModel, LlmPrecision, Prompt, Text
from export.checkpoint.llava import Checkpoint
from export.checkpoint.processor import load_tokenizer
from export.language.causal_lm import head_size, read_limits, write_causal_lm
from export.language.decoder_process import FAILED, PROGRESS, DecoderTask
from export.language.position_input import add_bias_input, add_position_input
from export.release_memory import release_memory

GRAPH_FILE = "llm/ort/model.onnx"
EMBEDDINGS_FILE = "llm/embeddings.safetensors"
TOKENIZER_FILE = "llm/tokenizer.json"

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and how many there will be."""

_LOG_LINES = 15
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Language:
    """What the manifest says of an exported language model."""

    model: LanguageModel
    text: Text
    prompt: Prompt


def export_language(
    checkpoint: Checkpoint,
    root: Path,
    precision: LlmPrecision = "int4",
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    progress: Progress | None = None,
) -> Language:
    """Write decoder, embedding table and tokenizer into a bundle.

    Args:
        checkpoint: an opened LLaVA checkpoint.
        root: the bundle's directory, while it is being written.
        precision: ``"int4"`` or ``"int8"`` (weights in blocks of 32, the language model's head
            included), or ``"fp32"`` (exact).
        device: where the decoder will run; for ``"cuda"`` it computes in float16.
        progress: called as weights are written.

    Raises:
        CheckpointError: a language model that cannot be exported.
        OptionError: a precision that the device has no kernel for.
    """
    model = export_decoder(checkpoint, root, precision, device=device, progress=progress)
    text = write_embeddings(checkpoint, root)
    write_tokenizer(checkpoint, root)
    return Language(model, text, checkpoint.prompt(TOKENIZER_FILE))


def export_decoder(
    checkpoint: Checkpoint,
    root: Path,
    precision: LlmPrecision = "int4",
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    progress: Progress | None = None,
) -> LanguageModel:
    """Write the decoder alone, as `export_language` does.

    Raises:
        CheckpointError: a language model that cannot be exported.
        OptionError: a precision that the device has no kernel for.
    """
    config: Any = checkpoint.text_config
    problems = read_limits(config)
    if problems:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: the language model cannot become an ONNX decoder: "
            f"{'; '.join(problems)}."
        )
    if device == "cuda" and precision == "fp32":
        raise OptionError(
            "An fp32 decoder runs on the CPU only, because grouped-query attention has no float32 "
            "kernel on CUDA. Choose --llm-precision int4 for a GPU."
        )
    write_decoder(checkpoint, root, precision, device=device, progress=progress)
    return LanguageModel(backend="ort", file=GRAPH_FILE, precision=precision, device=device)


def write_embeddings(checkpoint: Checkpoint, root: Path) -> Text:
    """Write the embedding table as float16[V, D] and return what the manifest says of it.

    Raises:
        CheckpointError: a number does not fit float16.
    """
    table = checkpoint.embedding_table()
    rows = table.to(torch.float16).contiguous()
    if not torch.isfinite(rows).all():
        raise CheckpointError(
            f"{checkpoint.root}: the embedding table holds numbers up to "
            f"{table.abs().max().item():g}, and float16 ends at 65504. The weights are damaged; "
            "download them again."
        )
    file = root / EMBEDDINGS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"embed_tokens": rows}, file)
    return Text(
        embeddings=EMBEDDINGS_FILE,
        vocabulary=rows.shape[0],
        hidden_size=rows.shape[1],
        context_length=int(checkpoint.text_config.max_position_embeddings),
        decoder=_decoder_shape(checkpoint, vocabulary=rows.shape[0]),
    )


def _decoder_shape(checkpoint: Checkpoint, vocabulary: int) -> DecoderShape:
    config: Any = checkpoint.text_config
    heads = config.num_attention_heads
    return DecoderShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=vocabulary,
    )


def write_tokenizer(checkpoint: Checkpoint, root: Path) -> None:
    """Write the tokenizer as transformers sets it up, which its own file alone may not say."""
    tokenizer: Any = load_tokenizer(checkpoint.root)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    file = root / TOKENIZER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(file))


def write_decoder(
    checkpoint: Checkpoint,
    root: Path,
    precision: LlmPrecision,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    progress: Progress | None = None,
) -> None:
    """Build the ONNX decoder into ``root``.

    Raises:
        OptionError: the model builder is not installed.
        CheckpointError: the model builder failed; its last lines are in the message.
    """
    if find_spec("onnxruntime_genai") is None:
        raise OptionError(
            "Building a decoder needs onnxruntime-genai, which is not installed. Install it with "
            '`pip install "foveate[export]"`.'
        )
    destination = root / GRAPH_FILE
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".decoder-", dir=root) as scratch:
        plain, built = Path(scratch, "causal_lm"), Path(scratch, "built")
        write_causal_lm(checkpoint, plain)
        _run_builder(DecoderTask(checkpoint.weights, plain, built, precision, device), progress)
        _complete_inputs(built / "model.onnx", checkpoint, device)
        for name in ("model.onnx", "model.onnx.data"):
            shutil.move(built / name, destination.parent / name)


def _run_builder(task: DecoderTask, progress: Progress | None) -> None:
    release_memory()
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    log: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "export.language.decoder_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **offline},
        preexec_fn=_end_with_parent if _LIBC is not None else None,  # noqa: PLW1509
    ) as process:
        try:
            with process.stdin or nullcontext() as stdin:
                pickle.dump(task, stdin)  # type: ignore[arg-type]
            for raw in process.stdout or ():
                line = raw.decode("utf-8", "replace").rstrip()
                if not line.startswith(PROGRESS):
                    log.append(line)
                elif progress is not None:
                    progress(*map(int, line.split()[1:]))
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return
    told = next((line for line in log if line.startswith(FAILED)), None)
    if told is not None:
        raise CheckpointError(f"{task.weights.root}: {told.removeprefix(FAILED).strip()}")
    last = "\n".join([line for line in log if line][-_LOG_LINES:])
    killed = ", killed, perhaps for want of memory" if process.returncode < 0 else ""
    raise CheckpointError(
        f"{task.weights.root}: onnxruntime-genai's model builder could not build the decoder "
        f"(exit status {process.returncode}{killed}). It said at the end:\n{last}"
    )


def _end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, however it ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _complete_inputs(graph: Path, checkpoint: Checkpoint, device: str) -> None:
    """Add positions, a bias, and the width of a key-value head to the cache's shapes.

    The builder leaves a name for that width, and the runtime allocates the cache by these shapes.
    """
    width = head_size(checkpoint.text_config)
    model = onnx.load(str(graph), load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = width
    add_position_input(model)
    if device == "cpu":
        add_bias_input(model)
    onnx.save(model, str(graph))
