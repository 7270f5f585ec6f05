"""The vision graph of a bundle inside Triton's Python backend, on one of this package's engines.

Imported by `model.py` of the model `NAME_vision_N` where `--vision python` was chosen;
`triton_python_backend_utils` is there alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from engines.bundle import open_bundle
from engines.errors import FoveateError
from engines.opening import open_session


class TritonPythonModel:
    """What Triton makes one of for each instance of the model."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Open the bundle that the model's `config.pbtxt` names."""
        config = json.loads(arguments["model_config"])
        given = {name: item["string_value"] for name, item in config["parameters"].items()}
        bundle = open_bundle(given["bundle"])
        self._session = open_session(
            bundle,
            bundle.vision(int(given["visual_tokens"])),
            engine=given["engine"] or None,
            batch=int(given["max_batch"]),
        )
        self._input = config["input"][0]["name"]
        self._outputs = [output["name"] for output in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run what the batcher put together as one batch."""
        inputs = [
            triton.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests
        ]  # float[b, 3, H, W] each
        try:
            outputs = self._session.run({self._input: np.concatenate(inputs)})
        except FoveateError as error:
            refused = triton.TritonError(str(error))
            return [triton.InferenceResponse(error=refused) for _ in requests]
        return list(self._answers(outputs, [len(pixel_values) for pixel_values in inputs]))

    def _answers(
        self, outputs: dict[str, np.ndarray[Any, Any]], sizes: Sequence[int]
    ) -> Iterator[Any]:
        """Yield to each request its share of the batch."""
        start = 0
        for size in sizes:
            tensors = []
            for name in self._outputs:
                share = np.ascontiguousarray(outputs[name][start : start + size])
                # One number for each picture is a row of one, as `config.pbtxt` says.
                tensors.append(triton.Tensor(name, share[:, None] if share.ndim == 1 else share))
            yield triton.InferenceResponse(tensors)
            start += size

    def finalize(self) -> None:
        """Free the graph; Triton calls it when the model is unloaded."""
        self._session.close()
