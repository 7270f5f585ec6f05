"""Export the language half of a bundle: embeddings, tokenizer, and a decoder for each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from engines.errors import CheckpointError, OptionError
from engines.llm_words import LlmDevice
from engines.manifest import LanguageModel, LlmPrecision, Prompt, Text
from engines.option_groups import Typed, one_of
from engines.progress_bar import Progress
from export.checkpoint.llava import Checkpoint
from export.kept_parts import KeptParts
from export.language.gguf_decoder import read_gguf_limits
from export.language.gguf_quantize import GgufPrecision, export_gguf
from export.language.onnx_decoder import (
    TOKENIZER_FILE,
    export_decoder,
    write_embeddings,
    write_tokenizer,
)
from runtime.backends.llama_library import load_llama_library

DecoderBackend = Literal["ort", "llamacpp", "openvino"]

_LIKE: dict[LlmPrecision, GgufPrecision] = {"int4": "q4_k_m", "int8": "q8_0", "fp32": "f16"}


def _read_backends(words: str) -> tuple[DecoderBackend, ...]:
    names = (name.strip() for name in words.split(","))
    return tuple(one_of("--llm-backend", name, DecoderBackend) for name in names)


@dataclass(frozen=True)
class DecoderOptions:
    """Which decoders to write.

    Attributes:
        backends: the first one is the bundle's default.
        precision: of the ONNX decoder.
        device: where ONNX Runtime will compute it.
        gguf_precision: of the GGUF decoder; None takes the one that is like `precision`.
    """

    backends: Annotated[
        tuple[DecoderBackend, ...],
        typer.Option(
            "--llm-backend",
            help="ort, llamacpp, openvino, or several with commas; the first is the default.",
        ),
        Typed(_read_backends, ",".join),
    ] = ("ort",)
    precision: Annotated[
        LlmPrecision, typer.Option("--llm-precision", help="int4, int8 or fp32.")
    ] = "int4"
    gguf_precision: Annotated[
        GgufPrecision | None,
        typer.Option(
            help="llama.cpp: q4_k_m, q8_0, f16 or f32; left out, q4_k_m for int4, q8_0 for int8, "
            "f16 for fp32."
        ),
    ] = None
    device: Annotated[
        LlmDevice,
        typer.Option(
            "--llm-device",
            help="Where ONNX Runtime will compute the decoder: cpu, or cuda for float16 on a GPU.",
        ),
    ] = "cpu"

    def precision_of(self, backend: DecoderBackend) -> LlmPrecision | GgufPrecision:
        """Return the precision a backend's decoder will have."""
        return self.chosen_gguf_precision if backend == "llamacpp" else self.precision

    @property
    def chosen_gguf_precision(self) -> GgufPrecision:
        """The GGUF decoder's precision, the default filled in."""
        return self.gguf_precision or _LIKE[self.precision]


@dataclass(frozen=True)
class LanguageModels:
    """What the manifest says of the language half.

    Attributes:
        models: one decoder for each backend.
        text: the embedding table.
        prompt: how a conversation becomes token ids.
        notes: what did not come out as small as asked for, in words.
    """

    models: tuple[LanguageModel, ...]
    text: Text
    prompt: Prompt
    notes: tuple[str, ...] = ()


def check_language_models(checkpoint: Checkpoint, options: DecoderOptions) -> None:
    """Refuse early what `export_language_models` would refuse late.

    Raises:
        OptionError: no backend, one twice, or llama-cpp-python is needed and missing.
        BackendError: llama-cpp-python is installed and does not load.
        CheckpointError: llama.cpp cannot run this language model.
    """
    backends = options.backends
    if not backends or len(set(backends)) != len(backends):
        raise OptionError(
            f"--llm-backend {','.join(backends)}: expected ort, llamacpp or openvino, each once."
        )
    if "llamacpp" not in backends:
        return
    problems = read_gguf_limits(checkpoint.text_config)
    if problems:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: the language model cannot become a GGUF file: "
            f"{'; '.join(problems)}. Build with --llm-backend ort."
        )
    precision = options.chosen_gguf_precision
    if precision in ("f16", "f32"):
        return
    if find_spec("llama_cpp") is None:
        raise OptionError(
            f"Quantizing a GGUF file to {precision} needs llama-cpp-python, which is not "
            'installed. Install it with `pip install "foveate[llamacpp]"`, or build with '
            "--gguf-precision f16."
        )
    load_llama_library()  # quantizing comes last, so what is missing is told now


def export_language_models(
    checkpoint: Checkpoint,
    root: Path,
    options: DecoderOptions,
    kept: KeptParts,
    progress: Progress = lambda line, done: None,
) -> LanguageModels:
    """Write the language half of a bundle.

    Args:
        checkpoint: an opened LLaVA checkpoint.
        root: the bundle's directory, while it is being written.
        options: which decoders.
        kept: decoders of a build that did not come to its end.
        progress: told of each decoder's bytes as they are written.

    Raises:
        FoveateError: a language model that one of the backends cannot run.
    """
    check_language_models(checkpoint, options)
    notes: list[str] = []
    written: dict[DecoderBackend, LanguageModel] = {}
    for index, backend in enumerate(options.backends):
        if other := next((one for one in written if _file_of(one) == _file_of(backend)), None):
            written[backend] = written[other].model_copy(
                update={"backend": backend, "device": options.device}
            )
            continue
        part = f"decoder_{_file_of(backend)}"
        precision = options.precision_of(backend)
        made_with = {"precision": precision, "backend": backend, "device": options.device}
        found = kept.restore(part, made_with, root)
        if found is None:
            told = _tell_bytes(progress, f"Decoder for {backend}", index, len(options.backends))
            model, said = _export_decoder(checkpoint, root, backend, options, told)
            folder = (root / model.file).parent
            files = [f.relative_to(root).as_posix() for f in folder.iterdir() if f.is_file()]
            kept.keep(part, made_with, root, files, [model.model_dump(mode="json"), said])
        else:
            model, said = LanguageModel.model_validate(found[0]), found[1]
        written[backend] = model
        notes += [said] if said else []
    text = write_embeddings(checkpoint, root)
    write_tokenizer(checkpoint, root)
    prompt = checkpoint.prompt(TOKENIZER_FILE)
    models = tuple(written[backend] for backend in options.backends)
    return LanguageModels(models, text, prompt, tuple(notes))


def _export_decoder(
    checkpoint: Checkpoint,
    root: Path,
    backend: DecoderBackend,
    options: DecoderOptions,
    told: Callable[[int, int], None],
) -> tuple[LanguageModel, str]:
    """Write one decoder and return what the manifest and the notes say of it."""
    if _file_of(backend) == "onnx":
        model = export_decoder(
            checkpoint, root, options.precision, device=options.device, progress=told
        )
        return model.model_copy(update={"backend": backend}), ""
    gguf = export_gguf(checkpoint, root, options.chosen_gguf_precision, told)
    return gguf.model, gguf.describe_fallbacks()


def _file_of(backend: DecoderBackend) -> Literal["onnx", "gguf"]:
    """Return which file a backend runs: ONNX Runtime and OpenVINO the same one."""
    return "gguf" if backend == "llamacpp" else "onnx"


def _tell_bytes(
    progress: Progress, name: str, index: int, decoders: int
) -> Callable[[int, int], None]:
    """Return what tells the bytes of one decoder as a share of all of them."""

    def tell(done: int, total: int) -> None:
        share = done / total if total else 1.0
        progress(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", (index + share) / decoders)

    return tell
