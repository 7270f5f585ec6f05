"""Triton's side of preprocessing: picture files to `pixel_values`, inside Triton's Python backend.

Imported by `model.py` of the model `NAME_preprocess`; `triton_python_backend_utils` is there alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from engines.errors import FoveateError
from engines.manifest import Preprocessing
from runtime.vision.pictures import picture_from_bytes
from runtime.vision.preprocess import preprocess_batch


class TritonPythonModel:
    """What Triton makes one of for each instance of the model."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Read the model's `config.pbtxt`, which Triton hands over as JSON."""
        config = json.loads(arguments["model_config"])
        text = config["parameters"]["preprocessing"]["string_value"]
        self._preprocessing = Preprocessing.model_validate_json(text)
        self._input = config["input"][0]["name"]
        self._output = config["output"][0]["name"]
        self._dtype = triton.triton_string_to_numpy(config["output"][0]["data_type"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests; one whose picture cannot be read gets an error, the others an answer."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        files = triton.get_input_tensor_by_name(request, self._input).as_numpy()  # bytes[B, 1]
        try:
            pictures = [
                picture_from_bytes(data, f"picture {at}") for at, data in enumerate(files.ravel())
            ]
            pixel_values = preprocess_batch(pictures, self._preprocessing)  # float32[B, 3, H, W]
        except FoveateError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        tensor = np.ascontiguousarray(pixel_values, self._dtype)
        return triton.InferenceResponse([triton.Tensor(self._output, tensor)])
