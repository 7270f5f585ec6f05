"""Judge whether a bundle's answers fit the memory, of this machine or of a device like its target.

A Jetson's CPU and GPU have one memory, so all parts are added. Elsewhere those of the GPU and those
of the host are judged apart.
"""

from __future__ import annotations

from engines.bundle import Bundle
from engines.device_facts import DeviceFacts
from engines.finding import Finding
from engines.gpu import NoGpu
from engines.memory.of_bundle import MemoryOptions, need_of_bundle, what_would_fit
from engines.memory.parts import MemoryNeed
from engines.targets import FREE_SHARE, Target

_ABOUT = "memory"
_MOST_PARTS = 4


def examine_memory(
    facts: DeviceFacts, bundle: Bundle, target: Target, asked: MemoryOptions
) -> Finding:
    """Judge whether a bundle can answer where it is going to run.

    Args:
        facts: this machine.
        bundle: an opened bundle.
        target: its device.
        asked: which graph, decoder and context.

    Raises:
        OptionError: the bundle has no such graph or decoder.
    """
    need = need_of_bundle(bundle, target, asked)
    if need is None:
        return Finding(
            _ABOUT,
            "note",
            "not counted: the bundle is an older one, which does not tell its decoder's shape",
            "build the bundle again",
        )
    elsewhere = target.needs_cuda and (isinstance(facts.gpu, NoGpu) or facts.gpu.sm != target.sm)
    if elsewhere:
        where, free = f"a {target.title} has about", target.free_bytes
        if not free:
            return Finding(_ABOUT, "note", f"{_told(need)}; target {target.name} has no memory_gb")
    else:
        where, free = "here are", _free_here(facts, need)
    said = f"{_told(need)}; {where} {free / 1e9:.1f} GB free"
    if _wanted(facts, target, need, elsewhere=elsewhere) <= free:
        return Finding(_ABOUT, "ok", said)
    would = what_would_fit(bundle, target, asked, free)
    fix = "; or ".join(would) if would else "a smaller model, or INT4 and INT8 in its place"
    return Finding(_ABOUT, "problem", said, f"does not fit; this would: {fix}")


def _wanted(facts: DeviceFacts, target: Target, need: MemoryNeed, *, elsewhere: bool) -> int:
    """Return what has to fit together: all, or what lies on a GPU of its own."""
    shared = target.memory_is_shared if elsewhere else _is_shared(facts)
    return need.total_bytes if shared or not need.bytes_on("gpu") else need.bytes_on("gpu")


def _free_here(facts: DeviceFacts, need: MemoryNeed) -> float:
    if isinstance(facts.gpu, NoGpu) or _is_shared(facts) or not need.bytes_on("gpu"):
        return facts.available_bytes
    return facts.gpu.memory_bytes * FREE_SHARE


def _is_shared(facts: DeviceFacts) -> bool:
    return not isinstance(facts.gpu, NoGpu) and facts.gpu.integrated


def _told(need: MemoryNeed) -> str:
    """Return the need and its largest parts in words; a formula's are marked."""
    largest = sorted(need.parts, key=lambda part: part.bytes, reverse=True)[:_MOST_PARTS]
    parts = ", ".join(
        f"{'~' if part.basis == 'estimate' else ''}{part.bytes / 1e9:.2f} {part.name}"
        for part in largest
    )
    return f"{need.total_bytes / 1e9:.1f} GB to answer ({parts})"
