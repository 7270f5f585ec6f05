"""Count what a model takes on a device from its shape alone, before anything is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engines.errors import OptionError
from engines.llm_words import KvCache
from engines.manifest import HALF_PRECISIONS, DecoderShape
from engines.memory.context_length import ContextNeed
from engines.memory.decoder import DecoderPlan, decoder_parts
from engines.memory.parts import MemoryNeed
from engines.memory.process import process_parts
from engines.memory.vision import VisionPlan, runs_on_gpu, vision_parts
from engines.roofline import (
    CLIP_L_336,
    CLIP_L_336_POSITIONS,
    Bits,
    TransformerShape,
    list_costs,
    total_cost,
)
from engines.targets import Target

_PRECISIONS = {
    "llamacpp": {"fp16": "f16", "int8": "q8_0", "int4": "q4_k_m"},
    "ort": {"int4": "int4", "fp32": "fp32"},
}
"""Backend -> precision of the estimate -> the backend's own word."""
_UNBOUNDED = 2**27


@dataclass(frozen=True)
class ModelPlan:
    """How a model is going to be run.

    Attributes:
        backend: ``"ort"`` or ``"llamacpp"``.
        precision: of the language model: fp16, int8 or int4; fp32 with ONNX Runtime.
        need: what the KV cache has to hold.
        context: positions of the KV cache; None counts them from ``need``.
        kv_cache: how llama.cpp keeps keys and values.
    """

    backend: str
    precision: str
    need: ContextNeed
    context: int | None = None
    kv_cache: KvCache = "f16"

    @property
    def positions(self) -> int:
        """What the KV cache holds."""
        return self.need.positions(_UNBOUNDED) if self.context is None else self.context


def need_of_model(shape: TransformerShape, target: Target, plan: ModelPlan) -> MemoryNeed:
    """Count what answering takes, with CLIP-L/336 as the tower.

    Raises:
        OptionError: the backend has no such precision or cache.
    """
    known = _PRECISIONS.get(plan.backend)
    if known is None or plan.precision not in known:
        held = "; ".join(f"{name}: {', '.join(words)}" for name, words in _PRECISIONS.items())
        raise OptionError(
            f"--backend {plan.backend} with --llm-precision {plan.precision}: there is no such "
            f"decoder. There are {held}."
        )
    if plan.kv_cache != "f16" and plan.backend != "llamacpp":
        raise OptionError(f"--kv-cache {plan.kv_cache} is for --backend llamacpp only.")
    on_gpu = target.needs_cuda
    decoder = DecoderPlan(
        backend=plan.backend,
        precision=known[plan.precision],
        positions=plan.positions,
        kv_cache=plan.kv_cache,
        on_gpu=on_gpu,
    )
    precision = target.default_precision
    vision = VisionPlan(
        engine=target.engine,
        weight_bytes=vision_bytes(shape.hidden, precision),
        positions=CLIP_L_336_POSITIONS,
        precision=precision,
    )
    cuda = on_gpu or runs_on_gpu(target.engine)
    parts = [*process_parts(cuda=cuda), *vision_parts(vision)]
    return MemoryNeed((*parts, *decoder_parts(decoder_shape(shape), decoder)))


def what_would_fit(
    shape: TransformerShape, target: Target, plan: ModelPlan, free_bytes: float
) -> list[str]:
    """Return the changes that make a model fit: each alone, and the last all together."""
    short = dataclasses.replace(plan, context=None).positions
    trials = {
        "--llm-precision int4": dataclasses.replace(plan, precision="int4"),
        "--kv-cache q8": dataclasses.replace(plan, kv_cache="q8"),
        f"--context {short}": dataclasses.replace(plan, context=None),
        "--tokens 16": dataclasses.replace(
            plan, need=dataclasses.replace(plan.need, visual_tokens=16), context=None
        ),
    }
    least = dataclasses.replace(trials["--tokens 16"], precision="int4", kv_cache="q8")
    trials["--llm-precision int4 --kv-cache q8 --tokens 16"] = least
    if plan.backend != "llamacpp":
        trials = {words: trial for words, trial in trials.items() if trial.kv_cache == "f16"}
    counted = {
        words: need_of_model(shape, target, trial).total_bytes for words, trial in trials.items()
    }
    now = need_of_model(shape, target, plan).total_bytes
    return [
        f"{words} ({size / 1e9:.1f} GB)"
        for words, size in counted.items()
        if size < now and size <= free_bytes
    ]


def decoder_shape(shape: TransformerShape) -> DecoderShape:
    """Return a shape in the manifest's words."""
    return DecoderShape(
        layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        vocabulary=shape.vocabulary,
    )


def vision_bytes(hidden_size: int, precision: str) -> int:
    """Return the size of CLIP-L/336's weights and of LLaVA's projector of two matrices."""
    bits = 16 if precision in HALF_PRECISIONS else 32
    costs = list_costs(CLIP_L_336, CLIP_L_336_POSITIONS, Bits(bits, 16, 16))
    projector = (CLIP_L_336.hidden + hidden_size) * hidden_size
    return int(total_cost(costs).weight_bytes + projector * bits / 8)
