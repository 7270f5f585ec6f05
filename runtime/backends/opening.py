"""Choosing a language backend by name.

Each is imported only when it is asked for, so that a machine needs the packages of one.
"""

from __future__ import annotations

from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.backends import LanguageBackend

BACKENDS = ("ort", "llamacpp")


def open_backend(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    context_length: int | None = None,
) -> LanguageBackend:
    """Open a bundle's language model.

    Args:
        bundle: an opened bundle.
        name: one of `BACKENDS`; left out, the bundle's first.
        threads: CPU threads; left out, one per physical core.
        context_length: positions the KV cache holds; left out, all the model was trained for.

    Raises:
        OptionError: no such backend, or the bundle holds no decoder for it.
        EngineError: this machine cannot load it.
        BackendError: it cannot be started.
    """
    chosen = name or bundle.language_model().backend
    if chosen == "ort":
        from runtime.backends.ort import open_ort_backend

        return open_ort_backend(bundle, threads=threads, context_length=context_length)
    if chosen == "llamacpp":
        from runtime.backends.llamacpp import open_llamacpp_backend

        return open_llamacpp_backend(bundle, threads=threads, context_length=context_length)
    raise OptionError(
        f'There is no language backend "{chosen}", expected one of {", ".join(BACKENDS)}.'
    )
