"""Run a vision graph with ONNX Runtime, on the CPU or on CUDA.

A session runs only on the device it was asked for and reuses its output buffers.
`create_inference_session` is the one place that configures ONNX Runtime; the decoder's backend uses
it too.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.chained_session import ChainedSession, SharedStages
from engines.cpu_flags import has_vnni
from engines.errors import EngineError
from engines.language_packages import ORT_INSTALL
from engines.session import Array, InputSpec, check_inputs

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}

# They join equal Q/DQ pairs, and a pair that several products share is not fused with any of them:
# half of an INT8 tower would then run in FP32.
_MERGE_EQUAL_NODES = ["IdenticalChildrenConsolidation", "CommonSubexpressionElimination"]

_FLOAT8 = "tensor(float8"

Optimization = Literal["none", "basic", "extended", "all"]
Provider = str | tuple[str, dict[str, str]]
"""ONNX Runtime's name of a provider, with its options where it has any."""


def create_inference_session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    providers: Sequence[Provider] = (CPU,),
    optimization: Optimization = "all",
    axes: Mapping[str, int] | None = None,
) -> onnxruntime.InferenceSession:
    """Load an ONNX file with telemetry off and without any silent fallback.

    Args:
        path: the graph; its external weights lie beside it.
        threads: CPU threads of one operator; left out, one per physical core.
        providers: where to run, in ONNX Runtime's names. The first one must take the graph; the CPU
            is always behind it for the few operators that belong there.
        optimization: how far ONNX Runtime may rewrite the graph.
        axes: sizes of named axes that will not change, so that shapes are not computed at each run.

    Raises:
        EngineError: the file is missing or damaged, or a provider is absent or cannot start.
    """
    onnxruntime = _onnxruntime()
    _refuse_absent_providers(onnxruntime, providers)
    complaints = "" if _names_of(providers) == [CPU] else _load_gpu_libraries()
    if threads is not None and threads < 1:
        raise EngineError(f"{path}: threads is {threads}, expected 1 or more.")
    options = _session_options(onnxruntime, threads, optimization, axes or {})
    names = _names_of(providers)
    try:
        session = _start(onnxruntime, str(path), options, providers)
    except Exception as error:  # ONNX Runtime's errors share no base class
        if names[0] != CPU and Path(path).is_file():
            reason = " ".join(f"{error} {complaints}".split())
            raise EngineError(_start_message(path, names[0], onnxruntime, reason)) from error
        raise EngineError(_load_message(Path(path), onnxruntime.__version__, error)) from error
    _read_names(Path(path), session)
    if session.get_providers()[0] != names[0]:
        raise EngineError(_start_message(path, names[0], onnxruntime, complaints))
    return session


def _session_options(
    onnxruntime: Any, threads: int | None, optimization: Optimization, axes: Mapping[str, int]
) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the cores from the other graph: the camera loop runs
    # two, the tower and the language model, side by side.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI the fast INT8 product of x86 saturates silently; take the exact one there.
    options.add_session_config_entry("session.x64quantprecision", "0" if has_vnni() else "1")
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel,
        "ORT_DISABLE_ALL" if optimization == "none" else f"ORT_ENABLE_{optimization.upper()}",
    )
    for axis, size in axes.items():
        options.add_free_dimension_override_by_name(axis, size)
    return options


def _start(onnxruntime: Any, path: str, options: Any, providers: Sequence[Provider]) -> Any:
    """Load the graph; without the fusion of Q/DQ where that stumbles over float8."""
    # ONNX Runtime's own fallback prints on stdout and goes on without the provider.
    start = functools.partial(
        onnxruntime.InferenceSession,
        path,
        options,
        providers=[*providers, *([] if CPU in _names_of(providers) else [CPU])],
        enable_fallback=0,
        disabled_optimizers=_MERGE_EQUAL_NODES,
    )
    try:
        return start()
    except Exception as error:  # ONNX Runtime's errors share no base class
        if _FLOAT8 not in str(error):
            raise
        # Its optimizer moves Q/DQ behind Transposes, which it does not have for float8.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return start()


def _read_names(path: Path, session: onnxruntime.InferenceSession) -> None:
    """Read every name of inputs, outputs and their axes once: they need not be text.

    Raises:
        EngineError: one is not.
    """
    try:
        for node in (*session.get_inputs(), *session.get_outputs()):
            _ = node.name, node.type, node.shape
    except UnicodeDecodeError as error:
        raise EngineError(
            f"{path}: the name of an input, an output or an axis is not UTF-8 ({error}). The file "
            "is damaged; copy or build it again."
        ) from error


def _onnxruntime() -> Any:
    """Import ONNX Runtime (0.2 s, so only when it is used), quiet and with telemetry off.

    Raises:
        EngineError: it is not installed; the extras that bring it are named.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise EngineError(
            f"ONNX Runtime, which is to run the graph, is not installed ({error}). Install it: "
            f"{ORT_INSTALL}. Or choose another --engine: openvino, tensorrt."
        ) from error

    onnxruntime.set_default_logger_severity(3)  # errors only: they are raised, warnings are noise
    return onnxruntime


@functools.cache
def _load_gpu_libraries() -> str:
    """Load the CUDA and cuDNN that pip installed, which ONNX Runtime does not find by itself.

    Returns:
        What could not be loaded, in ONNX Runtime's words.
    """
    import onnxruntime

    said = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(said):
            onnxruntime.preload_dlls()
    return " ".join(said.getvalue().split())


def _names_of(providers: Sequence[Provider]) -> list[str]:
    return [item if isinstance(item, str) else item[0] for item in providers]


def _refuse_absent_providers(onnxruntime: Any, providers: Sequence[Provider]) -> None:
    available = onnxruntime.get_available_providers()
    absent = [name for name in _names_of(providers) if name not in available]
    if absent or not providers:
        raise EngineError(
            f"The installed onnxruntime {onnxruntime.__version__} cannot run on "
            f"{', '.join(absent) or 'nothing'}, only on {', '.join(available)}. For a GPU replace "
            "it: `pip uninstall onnxruntime && pip install 'foveate[cuda]'`, on a "
            "Jetson a wheel of pypi.jetson-ai-lab.io for its JetPack; or run on the CPU."
        )


def _start_message(
    path: str | os.PathLike[str], provider: str, onnxruntime: Any, reason: str
) -> str:
    reason = reason.rstrip(".")
    cuda = getattr(onnxruntime, "cuda_version", None) or "12 or 13, as it was built,"
    return (
        f"{path}: {provider} could not start{f': {reason}' if reason else ''}. "
        f"onnxruntime-gpu {onnxruntime.__version__} needs CUDA {cuda}, cuDNN 9 and a driver for "
        "them: pip install 'foveate[cuda]' brings the first two, "
        "`python -m engines.doctor` shows the third. Or run on the CPU."
    )


def _load_message(path: Path, version: str, error: Exception) -> str:
    if not path.is_file():
        return f"{path} does not exist, expected an ONNX file. Check the path or build it again."
    reason = " ".join(str(error).split())
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a graph that ONNX Runtime {version} can "
        f"load: {reason}. The file is damaged, its weights are not beside it, or it needs a newer "
        "onnxruntime. Copy or build it again, or `pip install -U onnxruntime`."
    )


class OrtSession(contextlib.AbstractContextManager["OrtSession"]):
    """A graph on ONNX Runtime.

    Outputs whose shape follows from the inputs are written into buffers that are allocated once
    per input shape; `run` hands out copies, so a caller keeps what it got. Calls from several
    threads take turns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        optimization: Optimization = "all",
    ) -> None:
        """Load the graph; the arguments are those of `create_inference_session`.

        Raises:
            EngineError: as `create_inference_session`.
        """
        session = create_inference_session(
            path, threads=threads, providers=providers, optimization=optimization
        )
        self.path = Path(path)
        self._session: onnxruntime.InferenceSession | None = session
        self._provider = str(session.get_providers()[0])
        self._wanted = {
            node.name: InputSpec(_DTYPES.get(node.type, node.type), tuple(node.shape))
            for node in session.get_inputs()
        }
        self._outputs = {node.name: node for node in session.get_outputs()}
        self._buffers: dict[str, Array] = {}
        self._turn = threading.Lock()

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for what runs the graph."""
        return self._provider

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names `run` takes."""
        return tuple(self._wanted)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names `run` returns."""
        return tuple(self._outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; the arrays returned belong to the caller.

        Raises:
            EngineError: a name, shape or dtype is not what the graph takes, or the run failed.
        """
        sizes = check_inputs(self.path, self._wanted, inputs)
        with self._turn:
            if self._session is None:
                raise EngineError(f"{self.path}: the session is closed; open it again to run it.")
            binding = self._session.io_binding()
            for name, array in inputs.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            bound = [self._bind_output(binding, name, sizes) for name in self._outputs]
            self._run_bound(self._session, binding)
            fetched = None if all(bound) else binding.copy_outputs_to_cpu()
            return {
                name: self._buffers[name].copy() if ready or fetched is None else fetched[at]
                for at, (name, ready) in enumerate(zip(self._outputs, bound, strict=True))
            }

    @property
    def most_rows(self) -> None:
        """Any number of rows is taken at once."""
        return None

    def advance(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on arrays or OrtValues; return OrtValues where the provider computes.

        Raises:
            EngineError: as `run`.
        """
        arrays = {name: one for name, one in values.items() if isinstance(one, np.ndarray)}
        if arrays or not values:
            check_inputs(self.path, self._wanted, arrays)
        with self._turn:
            if self._session is None:
                raise EngineError(f"{self.path}: the session is closed; open it again to run it.")
            binding = self._session.io_binding()
            for name, value in values.items():
                if name in arrays:
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
                else:
                    binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, "cpu" if self._provider == CPU else "cuda")
            self._run_bound(self._session, binding)
            return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def fetch(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Copy OrtValues to arrays."""
        return {name: np.array(value.numpy()) for name, value in values.items()}

    def _run_bound(self, session: onnxruntime.InferenceSession, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = " ".join(str(error).split())
            raise EngineError(f"{self.path} failed on {self.provider}: {reason}") from error

    def _bind_output(self, binding: Any, name: str, sizes: Mapping[str, int]) -> bool:
        """Bind an output to its buffer; False where its shape is only known after the run."""
        node = self._outputs[name]
        known = [sizes.get(axis) if isinstance(axis, str) else axis for axis in node.shape]
        shape = tuple(axis for axis in known if axis is not None)
        dtype = _DTYPES.get(node.type)
        if dtype is None or len(shape) < len(known):
            binding.bind_output(name, "cpu")
            return False
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = np.empty(shape, dtype)
        binding.bind_output(name, "cpu", 0, dtype, shape, buffer.ctypes.data)
        return True

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph and its buffers; calling it again does nothing."""
        with self._turn:
            self._session = None
            self._buffers.clear()


def open_files(files: Sequence[Path], *, threads: int | None = None) -> OrtSession | ChainedSession:
    """Open the files of a vision graph on the CPU: one, or tower, reducer and projector.

    Raises:
        EngineError: as `create_inference_session`.
    """
    stages = [OrtSession(file, threads=threads) for file in files]
    if len(stages) == 1:
        return stages[0]
    tower, reducer, projector = stages
    return ChainedSession(SharedStages(tower, projector), reducer, owns_shared=True)
