"""Count what a bundle takes on a device, and say what would fit where it does not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.errors import EngineError, OptionError
from engines.llm_words import KvCache
from engines.manifest import VisionGraph
from engines.memory.context_length import ContextNeed
from engines.memory.decoder import (
    DecoderPlan,
    decoder_parts,
)
from engines.memory.parts import MemoryNeed
from engines.memory.process import process_parts
from engines.memory.vision import VisionPlan, runs_on_gpu, vision_parts
from engines.targets import Target
from engines.trt.plan import find_plan, read_record


@dataclass(frozen=True)
class MemoryOptions:
    """What is going to be asked of a bundle.

    Attributes:
        context: positions of the KV cache; None counts them from ``need``.
        kv_cache: how llama.cpp keeps keys and values.
        need: what the cache has to hold.
        backend: which decoder; None is the bundle's first.
        tokens: which vision graph; None is the one with the largest budget.
    """

    context: int | None = None
    kv_cache: KvCache = "f16"
    need: ContextNeed = ContextNeed(exchanges=1)
    backend: str | None = None
    tokens: int | None = None


def need_of_bundle(bundle: Bundle, target: Target, options: MemoryOptions) -> MemoryNeed | None:
    """Count what answering takes; None where the bundle does not tell its decoder's shape.

    Args:
        bundle: an opened bundle.
        target: the device; it says what runs the graphs.
        options: what is asked of it.

    Raises:
        OptionError: the bundle has no such graph or decoder, or the decoder no such cache.
    """
    shape = bundle.manifest.text.decoder
    if shape is None:
        return None
    graph = bundle.vision(options.tokens) if options.tokens else bundle.largest_vision()
    model = bundle.language_model(options.backend)
    if options.kv_cache != "f16" and model.backend != "llamacpp":
        raise OptionError(
            f"--kv-cache {options.kv_cache}: only llama.cpp has it, and this is the bundle's "
            f"decoder for {model.backend}. Leave it out, or choose --backend llamacpp."
        )
    context = options.context
    if context is None:
        need = _need_of_pictures(bundle, graph, options)
        context = need.positions(bundle.manifest.text.context_length)
    on_gpu = model.device == "cuda" or (target.needs_cuda and model.backend == "llamacpp")
    decoder = DecoderPlan(
        backend=model.backend,
        precision=model.precision,
        positions=context,
        kv_cache=options.kv_cache,
        on_gpu=on_gpu,
        file_bytes=_decoder_bytes(bundle, model.file),
    )
    vision = _vision_plan(bundle, graph, target)
    parts = [*vision_parts(vision), *decoder_parts(shape, decoder)]
    return MemoryNeed((*process_parts(cuda=on_gpu or runs_on_gpu(vision.engine)), *parts))


def what_would_fit(
    bundle: Bundle, target: Target, options: MemoryOptions, free_bytes: float
) -> list[str]:
    """Return the changes that make a bundle fit, each alone, and the last all together.

    Args:
        bundle: the bundle that does not.
        target: the device.
        options: what was asked of it.
        free_bytes: what is free.
    """
    graphs = sorted(bundle.manifest.vision, key=lambda graph: graph.reducer.tokens)
    largest = bundle.largest_vision()
    need = _need_of_pictures(bundle, largest, options)
    short = need.positions(bundle.manifest.text.context_length)
    trials: list[tuple[str, MemoryOptions]] = []
    if options.context is not None and options.context > short:
        trials.append((f"--context {short}", dataclasses.replace(options, context=short)))
    if bundle.language_model(options.backend).backend == "llamacpp" and options.kv_cache == "f16":
        trials.append(("--kv-cache q8", dataclasses.replace(options, kv_cache="q8")))
    if options.context is None and len(graphs) > 1:
        few = graphs[0].reducer.tokens
        smaller = dataclasses.replace(options, tokens=few)
        trials.append((f"--visual-tokens {few}", smaller))
    for model in bundle.manifest.language_models:
        if model.backend != (options.backend or bundle.language_model().backend):
            other = dataclasses.replace(options, backend=model.backend, kv_cache="f16")
            trials.append((f"--backend {model.backend} ({model.precision})", other))
    found = []
    for words, trial in trials:
        counted = need_of_bundle(bundle, target, trial)
        if counted is not None and counted.total_bytes <= free_bytes:
            found.append(f"{words} ({counted.total_bytes / 1e9:.1f} GB)")
    return found


def _need_of_pictures(bundle: Bundle, graph: VisionGraph, options: MemoryOptions) -> ContextNeed:
    patches = bundle.most_squares * _patches(graph)
    return options.need.with_visual_tokens(bundle.most_visual_tokens(graph), patches)


def _patches(graph: VisionGraph) -> int:
    """Return the patches of a square."""
    return graph.patch_rows * graph.patch_columns


def _decoder_bytes(bundle: Bundle, file: str) -> int:
    """Return the size of a decoder's file with what lies beside it as its weights."""
    files = bundle.manifest.files
    return sum(record.bytes for name, record in files.items() if name.startswith(file))


def _vision_plan(bundle: Bundle, graph: VisionGraph, target: Target) -> VisionPlan:
    stages = bundle.stages(graph)
    plan = VisionPlan(
        engine=target.engine,
        weight_bytes=sum(map(bundle.graph_bytes, stages)),
        positions=_patches(graph) + 1,
        precision=stages[0].precision,
        batch=bundle.most_squares,
    )
    if not target.needs_cuda:
        return plan
    try:
        records = [read_record(find_plan(bundle, stage, target)) for stage in stages]
    except EngineError:  # one was not built, or is damaged, which the doctor tells apart
        return plan
    contexts = [record.context_bytes for record in records]
    return dataclasses.replace(
        plan,
        weight_bytes=sum(record.plan_bytes for record in records),
        context_bytes=None if None in contexts else sum(filter(None, contexts)),
    )
