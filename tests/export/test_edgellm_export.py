"""NVIDIA's own exporter for Jetson reads what `export.served_model` writes; needs no GPU.

`make test-edgellm` unpacks the wheel of TensorRT Edge-LLM, and `FOVEATE_EDGELLM` says where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint.llava import open_checkpoint
from export.language.served_model import write_served_model

pytestmark = [
    pytest.mark.edgellm,
    pytest.mark.skipif(
        "FOVEATE_EDGELLM" not in os.environ, reason="TensorRT Edge-LLM: run `make test-edgellm`"
    ),
]
POCKET = Path(__file__).parents[2] / "models" / "pocket-llava"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edge")
    write_served_model(open_checkpoint(POCKET), out / "llm")
    command = [sys.executable, "-m", "tensorrt_edgellm.scripts.export", out / "llm", out / "onnx"]
    wheel = str(Path(os.environ["FOVEATE_EDGELLM"]).resolve())
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": wheel},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "onnx" / "llm"


def test_the_decoder_takes_embeddings(exported: Path) -> None:
    """So visual tokens need no change of the engine, only a runner that hands them over."""
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    shapes = {
        value.name: [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["inputs_embeds"] == ["physical_tokens", 128]
    assert "input_ids" not in shapes


def test_text_rows_are_the_checkpoint_s(exported: Path) -> None:
    (table,) = load_file(exported / "embedding.safetensors").values()
    expected = open_checkpoint(POCKET).embedding_table()
    assert table.dtype == torch.float16
    torch.testing.assert_close(table, expected.half(), rtol=0, atol=0)
