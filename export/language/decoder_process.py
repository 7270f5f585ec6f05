"""Build an ONNX decoder in a process of its own: `python -m export.language.decoder_process`.

It reads a pickled `DecoderTask` from stdin and prints what onnxruntime-genai's builder prints,
and lines with the bytes written so far. The builder prints and edits the import path, hence the
process. Three of its steps are replaced, because it would hold a float32 copy of every weight.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from engines.manifest import LlmPrecision
from export.checkpoint.weights import LlavaWeights, Part
from export.language.causal_lm import EMBEDDINGS, HEAD, padded
from export.language.deferred_weights import deferred_language_model

PROGRESS = "written"
"""The first word of the lines that tell bytes: `written DONE TOTAL`."""
FAILED = "failed:"
"""The first word of the last line, where the checkpoint is at fault."""


@dataclass(frozen=True)
class DecoderTask:
    """What to build.

    Attributes:
        weights: of the checkpoint.
        plain: a directory with the plain language model's configuration and tokenizer.
        built: where the decoder is to be.
        precision: of the decoder.
        device: where it will run.
    """

    weights: LlavaWeights
    plain: Path
    built: Path
    precision: LlmPrecision
    device: Literal["cpu", "cuda"]


def build_decoder(task: DecoderTask) -> None:
    """Build the decoder, saying on stdout how far it is.

    Raises:
        CheckpointError: the tensors are not those that the configuration describes.
    """
    from onnxruntime_genai.models import builder

    torch.set_num_threads(1)  # each core computes a tensor of its own
    config = AutoConfig.from_pretrained(task.plain, local_files_only=True)
    rows = int(config.vocab_size)
    shapes = task.weights.shapes(Part.LANGUAGE_MODEL)
    for name in {EMBEDDINGS, HEAD} & shapes.keys():
        shapes[name] = (max(rows, shapes[name][0]), *shapes[name][1:])

    def read(name: str) -> Tensor:
        tensor = task.weights.read(Part.LANGUAGE_MODEL, [name])[name]
        return padded(tensor, rows) if name in (EMBEDDINGS, HEAD) else tensor

    model = deferred_language_model(config, read, shapes)
    _replace_steps(builder.Model, model)
    paths = (str(task.plain), str(task.built), task.precision, task.device, str(task.built / "c"))
    given = ["exclude_embeds=true", "prune_lm_head=true"]
    options = builder.parse_extra_options("", *paths, given)
    with torch.no_grad():
        builder.create_model("", *paths, **options)


def _replace_steps(builder_model: Any, weights: torch.nn.Module) -> None:
    steps = {
        "load_weights": lambda built, path: weights,
        "save_model": _save_model,
        "make_genai_config": lambda built, *_: None,
        "save_processing": lambda built, *_: None,
    }
    for name, step in steps.items():
        if not hasattr(builder_model, name):
            raise RuntimeError(
                f"This onnxruntime-genai's model builder has no step {name!r}. Install the "
                "release that constraints.txt names."
            )
        setattr(builder_model, name, step)


def _save_model(built: Any, folder: str) -> None:
    """Quantize and write, in place of the builder's own step of this name."""
    from export.language.block_weights import plain_pieces, quantize_matrices
    from export.language.stream_graph import write_graph_and_weights

    blocks = _blocks(built)
    if blocks is None:
        pieces = plain_pieces(built.model.graph)
    else:
        pieces = quantize_matrices(built.model, blocks, built.quant_attrs["nodes_to_exclude"])
    built.stamp_build_metadata(built.model)
    write_graph_and_weights(
        built.model,
        pieces,
        Path(folder, built.filename),
        lambda done, total: print(PROGRESS, done, total, flush=True),
    )


def _blocks(built: Any) -> Any:
    """Return how the builder wants weights quantized; None where they stay as they are."""
    from export.language.block_weights import Blocks

    if built.onnx_dtype.name not in ("INT4", "UINT4", "INT8", "UINT8"):
        return None
    wanted = built.quant_attrs
    unknown = {
        "its algorithm": getattr(built, "quantization_algo", "default") != "default",
        "bits that differ by layer": bool(getattr(built, "int4_customized_weight_config", None)),
        "exact overrides": bool(getattr(built, "exact_quant_override_names", None)),
        "Q/DQ nodes": bool(wanted["use_qdq"]),
        "an embedding table": "Gather" in wanted["op_types_to_quantize"]
        and any(n.op_type == "Gather" and n.inputs[0].const_value for n in built.model.graph),
        "prepacked weights": built.ep == "cuda" and built.matmul_attrs["weights_prepacked"] > 0,
    }
    if any(unknown.values()):
        told = ", ".join(name for name, found in unknown.items() if found)
        raise RuntimeError(
            f"onnxruntime-genai's model builder asks for what is not quantized here: {told}. "
            "Install the release that constraints.txt names."
        )
    return Blocks(
        bits=int(wanted["bits"]),
        size=int(wanted["matmul_block_size"]),
        symmetric=bool(wanted["is_symmetric"]),
        accuracy_level=int(wanted["accuracy_level"] or 0),
    )


if __name__ == "__main__":
    from engines.errors import CheckpointError

    task: DecoderTask = pickle.load(sys.stdin.buffer)  # noqa: S301, of our own parent
    try:
        build_decoder(task)
    except CheckpointError as error:
        print(FAILED, error, flush=True)
        sys.exit(1)
