"""Damaged checkpoints: each opens, or is refused with a `CheckpointError`, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.checkpoint.accuracy_table import AccuracyTable
from export.checkpoint.llava import open_checkpoint
from export.language.onnx_decoder import write_tokenizer
from tests.faults.file_mutations import Mutation, draw_mutations, load_seeds
from tests.faults.scale import cases
from tests.faults.trial import try_all
from tests.tiny_language import tiny_llava, write_checkpoint

ACCURACY = '{"reducers": {"visionzip": {"fp32": {"8": {"exact": 0.5}}}}}'
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_checkpoint(tmp_path_factory.mktemp("hostile") / "tiny", tiny_llava())
    (root / "accuracy_by_budget.json").write_text(ACCURACY)
    _write_index(root)
    return root


def _write_index(root: Path) -> None:
    import json

    from safetensors import safe_open

    with safe_open(root / "model.safetensors", "pt") as shard:
        names = list(shard.keys())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (root / INDEX).write_text(json.dumps(index))


def read_everything(root: Path, out: Path) -> None:
    """Read what a build reads."""
    checkpoint = open_checkpoint(root)
    checkpoint.prompt("llm/tokenizer.json")
    assert AccuracyTable(root) is not None
    write_tokenizer(checkpoint, out)
    for model in (checkpoint.vision_model(), checkpoint.projector(), checkpoint.language_model()):
        for parameter in model.parameters():
            assert torch.isfinite(parameter).all()


def test_damaged_checkpoints(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    contents = {file.name: file.read_bytes() for file in sorted(checkpoint.iterdir())}
    torch.set_num_threads(1)

    def reset() -> None:
        for name, content in contents.items():
            (checkpoint / name).write_bytes(content)

    def work(mutation: Mutation) -> None:
        file = checkpoint / mutation.file
        file.write_bytes(mutation.apply(contents[mutation.file]))
        try:
            read_everything(checkpoint, tmp_path)
        finally:
            file.write_bytes(contents[mutation.file])

    drawn = draw_mutations(contents, seed=14, count=cases(1200))
    outcome = try_all([*load_seeds("checkpoints"), *drawn], work, reset)
    outcome.check("checkpoints", capsys)
    assert outcome.refused > outcome.tried // 3
