"""Open a language backend by name; only the one that is asked for is imported."""

from __future__ import annotations

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.llm_words import SERVERS, KvCache, LlmDevice, Positions, VisualWeights
from engines.memory.context_length import ContextNeed
from runtime.backends import LanguageBackend, TextBackend
from runtime.backends.chat_server import ServerOptions
from runtime.language.prompt import PromptWriter

BACKENDS = ("ort", "llamacpp", "openvino", *SERVERS)

_NO_POSITIONS = {
    "ort": "this bundle's ONNX decoder is of an earlier release and takes consecutive positions "
    "only. Build the bundle again, or use --backend openvino.",
    "llamacpp": "llama.cpp refuses a prompt whose positions leave some out. Use --backend ort or "
    "openvino, or leave the option out.",
}
"""Backends that may not take positions, and why."""
_NO_BIAS = {
    "ort": "this bundle's ONNX decoder is of an earlier release, or for a GPU, and all visual "
    "tokens count the same to it. Build the bundle again for a CPU, or use --backend openvino.",
    "llamacpp": "llama.cpp has no input for it. Use --backend ort or openvino, or leave the option "
    "out.",
}
"""Backends to which all visual tokens may count the same, and why."""


def open_text_backend(
    writer: PromptWriter,
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    context_length: int | None = None,
    need: ContextNeed = ContextNeed(),
    kv_cache: KvCache = "f16",
    positions: Positions = "compact",
    visual_weights: VisualWeights = "equal",
    device: LlmDevice | None = None,
    server: ServerOptions | None = None,
) -> TextBackend:
    """Open a bundle's language model, here or on a server, to write text.

    Args:
        writer: writes the bundle's prompts.
        bundle: an opened bundle.
        name: one of `BACKENDS`; left out, the server's where there is one, or the bundle's first.
        threads: CPU threads; left out, one per physical core.
        context_length: positions the KV cache holds; left out, what ``need`` asks for.
        need: what the KV cache has to hold; left out, four questions about a picture.
        kv_cache: how llama.cpp keeps keys and values.
        positions: where visual tokens will stand.
        visual_weights: how much they will count in attention.
        device: where ONNX Runtime computes; left out, where the decoder was built for.
        server: how to reach the server that runs the language model.

    Raises:
        OptionError: no such backend, the bundle holds no decoder for it, or options of a server
            and of this process that do not go together.
        EngineError: this machine cannot load it.
        BackendError: it cannot be started, or the server does not answer.
    """
    if name in SERVERS or (name is None and server is not None):
        name = name or SERVERS[0]
        if server is None:
            raise OptionError(
                f'The backend "{name}" is a server, and its address is missing. Give it with '
                "--llm-url, for example --llm-url http://127.0.0.1:8000/v1."
            )
        _refuse_local_options(context_length, kv_cache, device)
        require_plain_tokens(positions, visual_weights)
        return open_served_backend(name, bundle, server, writer)
    if server is not None:
        raise OptionError(
            f'--llm-url {server.url} is the address of a server, and the backend "{name}" runs '
            "here. Leave one of them out."
        )
    _refuse_positions_in_tiles(bundle, positions)
    from runtime.backends.local_text import LocalText

    local = open_backend(
        bundle,
        name,
        threads=threads,
        context_length=context_length,
        need=need,
        kv_cache=kv_cache,
        device=device,
    )
    problems = _lacking(local, positions, visual_weights)
    if problems:
        local.close()
        raise OptionError(" ".join(problems))
    return LocalText(local, writer)


def _refuse_local_options(
    context_length: int | None, kv_cache: KvCache, device: LlmDevice | None
) -> None:
    """Refuse options of a language model in this process, where a server runs it."""
    if context_length is not None:
        raise OptionError(
            "--context has no meaning for a server, which has a context of its own. "
            "Leave it out, or start the server with a length (vLLM: --max-model-len, "
            "TensorRT-LLM: --max_seq_len)."
        )
    if kv_cache != "f16" or device is not None:
        raise OptionError(
            "--kv-cache and --llm-device have no meaning for a server, which chooses for "
            "itself. Leave them out, or start the server with options of its own, such as "
            "vLLM's --kv-cache-dtype."
        )


def _refuse_positions_in_tiles(bundle: Bundle, positions: Positions) -> None:
    if positions != "compact" and bundle.most_squares > 1:
        raise OptionError(
            f"--positions {positions}: {bundle.root} cuts pictures into tiles, among whose tokens "
            "newlines stand, and where each would stand without reduction is not computed. Leave "
            "the option out."
        )


def _lacking(
    local: LanguageBackend, positions: Positions, visual_weights: VisualWeights
) -> list[str]:
    """Return what a backend cannot do of what is asked of its attention."""
    problems = []
    if positions != "compact" and not local.capabilities.positions:
        problems.append(f"--positions {positions}: {_NO_POSITIONS[local.name]}")
    if visual_weights != "equal" and not local.capabilities.bias:
        problems.append(f"--visual-weights {visual_weights}: {_NO_BIAS[local.name]}")
    return problems


def open_served_backend(
    name: str, bundle: Bundle, server: ServerOptions, writer: PromptWriter
) -> TextBackend:
    """Ask a server of one of `SERVERS` what it serves and make ready to ask it more.

    Raises:
        BackendError: no server, no such model, or several to choose from.
    """
    if name == "trtllm":
        from runtime.backends.trtllm import open_trtllm_backend

        return open_trtllm_backend(bundle, server, writer)
    from runtime.backends.vllm import open_vllm_backend

    return open_vllm_backend(bundle, server, writer)


def require_plain_tokens(positions: Positions, visual_weights: VisualWeights) -> None:
    """Check that a server of the language model can do what is asked of its attention.

    Raises:
        OptionError: it cannot.
    """
    if positions != "compact":
        raise OptionError(
            f"--positions {positions}: a server of the language model numbers the visual tokens "
            "itself, one after the other. Leave the option out, or use --backend ort or openvino."
        )
    if visual_weights != "equal":
        raise OptionError(
            f"--visual-weights {visual_weights}: to a server of the language model all visual "
            "tokens count the same. Leave the option out, or use --backend ort or openvino."
        )


def open_backend(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    context_length: int | None = None,
    need: ContextNeed = ContextNeed(),
    kv_cache: KvCache = "f16",
    device: LlmDevice | None = None,
) -> LanguageBackend:
    """Open a bundle's language model in this process, where it gives logits.

    Args:
        bundle: an opened bundle.
        name: ``"ort"``, ``"llamacpp"`` or ``"openvino"``; left out, the bundle's first.
        threads: CPU threads; left out, one per physical core.
        context_length: positions the KV cache holds; left out, what ``need`` asks for.
        need: what the KV cache has to hold; left out, four questions about a picture.
        kv_cache: how llama.cpp keeps keys and values.
        device: where ONNX Runtime computes; left out, where the decoder was built for.

    Raises:
        OptionError: no such backend, or the bundle holds no decoder for it.
        EngineError: this machine cannot load it.
        BackendError: it cannot be started.
    """
    chosen = name or bundle.language_model().backend
    if chosen == "ort":
        if kv_cache != "f16":
            raise OptionError(
                f"--kv-cache {kv_cache}: the attention of ONNX Runtime's decoders keeps keys and "
                "values in the type it computes in. Use --backend llamacpp, or a smaller --context."
            )
        from runtime.backends.ort import open_ort_backend

        return open_ort_backend(
            bundle, threads=threads, context_length=context_length, need=need, device=device
        )
    if chosen == "llamacpp":
        if device is not None:
            raise OptionError(
                f"--llm-device {device}: llama.cpp uses the GPU where it was built with one "
                '(CMAKE_ARGS="-DGGML_CUDA=on"), and the CPU elsewhere. Leave the option out.'
            )
        from runtime.backends.llamacpp import open_llamacpp_backend

        return open_llamacpp_backend(
            bundle, threads=threads, context_length=context_length, need=need, kv_cache=kv_cache
        )
    if chosen == "openvino":
        if kv_cache != "f16" or device is not None:
            raise OptionError(
                "--kv-cache and --llm-device have no meaning for OpenVINO, which runs on the CPU "
                "and keeps keys and values in the type it computes in. Leave them out."
            )
        from runtime.backends.openvino_backend import open_openvino_backend

        return open_openvino_backend(
            bundle, threads=threads, context_length=context_length, need=need
        )
    if chosen in SERVERS:
        raise OptionError(
            f'The backend "{chosen}" is a server that gives text only, and logits are needed here. '
            "Choose ort, llamacpp or openvino."
        )
    raise OptionError(
        f'There is no language backend "{chosen}", expected one of {", ".join(BACKENDS)}.'
    )
