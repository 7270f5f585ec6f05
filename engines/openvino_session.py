"""Run a vision graph with OpenVINO, on the CPU of an x86 board.

OpenVINO rounds FP32 to BF16 by default on CPUs that have BF16; this session asks for FP32. With
``rest="bf16"`` the tower's unquantized part runs in BF16 and the selection of tokens stays in FP32,
because a rounded score may keep another patch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engines.errors import EngineError
from engines.openvino_split import has_selection, split_at_selection
from engines.session import Array, InputSpec, check_inputs

Rest = Literal["fp32", "bf16"]


class OpenVinoSession(AbstractContextManager["OpenVinoSession"]):
    """A graph compiled for this CPU. Calls from several threads take turns."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        rest: Rest = "fp32",
        cache: Path | None = None,
    ) -> None:
        """Compile the graph.

        Args:
            path: the ONNX file; its external weights lie beside it.
            threads: CPU threads; left out, OpenVINO's own choice, one per physical core.
            rest: type of the tower where it is not quantized; what chooses tokens is always
                FP32. BF16 needs a CPU with AVX-512 BF16 or AMX.
            cache: folder to keep the compiled graph in, so that the next start is fast.

        Raises:
            EngineError: OpenVINO is not installed, the graph is missing or damaged, or the CPU
                lacks BF16.
        """
        openvino = _import_openvino()
        self.path = path
        if not path.is_file():
            raise EngineError(f"{path} does not exist, expected an ONNX file. Build it again.")
        core = openvino.Core()
        _refuse_missing_bf16(core, rest)
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if cache is not None:
            settings["CACHE_DIR"] = str(cache)
        try:
            model = core.read_model(path)
            halves, self._border = _halves(openvino, model, rest)
            self._stages: list[Any] = [
                core.compile_model(half, "CPU", {**settings, "INFERENCE_PRECISION_HINT": hint})
                for half, hint in halves
            ]
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise EngineError(
                f"{path} ({path.stat().st_size:,} bytes) is not a graph that OpenVINO "
                f"{openvino.__version__} can run: {reason[-600:]} Build it again, or run it with "
                "ONNX Runtime: --engine ort."
            ) from error
        self._requests: list[Any] = [stage.create_infer_request() for stage in self._stages]
        self._provider = f"OpenVINO {str(openvino.__version__).split('-')[0]} ({rest})"
        self._wanted = {node.get_any_name(): _spec(node) for node in self._stages[0].inputs}
        self._outputs = [_onnx_name(result) for result in model.get_results()]
        self._turn = threading.Lock()

    @property
    def provider(self) -> str:
        """OpenVINO's version and the type of what is not quantized."""
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
        with self._turn:
            return self.fetch(self._advance(inputs))

    @property
    def most_rows(self) -> None:
        """Any number of rows is taken at once."""
        return None

    def advance(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on arrays or tensors; return tensors, which the next run overwrites.

        Raises:
            EngineError: as `run`.
        """
        with self._turn:
            return self._advance(values)

    def fetch(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Copy tensors to arrays."""
        return {name: tensor.data.copy() for name, tensor in values.items()}

    def _advance(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: one for name, one in inputs.items() if isinstance(one, np.ndarray)}
        if arrays or not inputs:
            check_inputs(self.path, self._wanted, arrays)
        if not self._requests:
            raise EngineError(f"{self.path}: the session is closed; open it again to run it.")
        values: dict[str, Any] = dict(inputs)
        values |= {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            for request in self._requests:
                request.infer(values, share_inputs=True)
                values = {name: request.get_tensor(name) for name in self._border}
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise EngineError(f"{self.path} failed on {self.provider}: {reason}") from error
        return dict(zip(self._outputs, self._requests[-1].output_tensors, strict=True))

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph and its buffers; calling it again does nothing."""
        with self._turn:
            self._requests.clear()
            self._stages.clear()


def _halves(openvino: Any, model: Any, rest: Rest) -> tuple[list[tuple[Any, str]], tuple[str, ...]]:
    """Return what to compile with which precision, and the tensors that pass between."""
    if rest == "fp32":
        return [(model, "f32")], ()
    if not has_selection(model):
        return [(model, "bf16")], ()
    split = split_at_selection(openvino, model)
    return [(split.tower, "bf16"), (split.selection, "f32")], split.border


def _spec(node: Any) -> InputSpec:
    axes = (None if axis.is_dynamic else axis.get_length() for axis in node.get_partial_shape())
    return InputSpec(node.get_element_type().to_dtype(), tuple(axes))


def _onnx_name(result: Any) -> str:
    """Return the graph's name of an output; its tensor may carry that of an inner node as well."""
    return str(result.get_friendly_name()).split("/sink_port")[0]


def cpu_has_bf16() -> bool:
    """Tell whether OpenVINO can compute in BF16 on this CPU (AVX-512 BF16 or AMX).

    Raises:
        EngineError: OpenVINO is not installed.
    """
    return _has_bf16(_import_openvino().Core())


def _has_bf16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _refuse_missing_bf16(core: Any, rest: Rest) -> None:
    if rest == "bf16" and not _has_bf16(core):
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise EngineError(
            f"This CPU ({name}) has neither AMX nor AVX-512 BF16, so nothing can run in BF16. "
            'Leave the rest in FP32 (rest="fp32").'
        )


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"OpenVINO is not installed ({error}). Install it: pip install 'foveate[openvino]', or "
            "run the graph with ONNX Runtime: --engine ort."
        ) from error
    return openvino
