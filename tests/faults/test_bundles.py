"""Bundles of strangers: damaged ones are told, and those with right hashes do no harm."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle, open_bundle
from engines.errors import FoveateError
from engines.manifest import manifest_from_json
from runtime.language.generate import GenerationOptions
from runtime.model import open_model
from tests.faults.file_mutations import Mutation, draw_mutations, load_seeds
from tests.faults.scale import FULL, cases
from tests.faults.trial import try_all
from tests.tiny_bundle import write_tiny_bundle

PICTURE = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(language_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a bundle that answers, to be damaged; without the manifest's checksum."""
    root = tmp_path_factory.mktemp("hostile") / "bundle"
    shutil.copytree(language_bundle.root, root)
    manifest = json.loads((root / "bundle.json").read_text())
    del manifest["checksum"]
    (root / "bundle.json").write_text(json.dumps(manifest))
    return root


def put(root: Path, name: str, content: bytes) -> None:
    """Write a file of a bundle and give it its right hash, as a stranger would."""
    (root / name).write_bytes(content)
    manifest = json.loads((root / "bundle.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"sha256": digest, "bytes": len(content)}
    (root / "bundle.json").write_text(json.dumps(manifest))


def answer(root: Path) -> None:
    """Ask about a picture; what is said must be text."""
    with open_model(open_bundle(root), threads=1, context_length=None) as model:
        said = model.ask(PICTURE, "What is in the picture?", GenerationOptions(max_tokens=3))
        assert isinstance(said.text, str)
        assert len(said.text) < 10_000


def test_every_flip_of_one_bit_is_detected(tmp_path: Path) -> None:
    """In every byte of every file but bundle.json, which describes the others."""
    root = write_tiny_bundle(tmp_path / "tiny")
    random, flips = Random(14), 0
    for name in open_bundle(root).manifest.files:
        file = root / name
        content = file.read_bytes()
        step = 1 if FULL else 41
        for at in range(0, len(content), step):
            changed = bytes([content[at] ^ (1 << random.randrange(8))])
            file.write_bytes(content[:at] + changed + content[at + 1 :])
            with pytest.raises(FoveateError, match="was changed"):
                open_bundle(root)
            flips += 1
        file.write_bytes(content)
    open_bundle(root)
    assert flips > 30


def test_every_flip_of_one_bit_in_the_manifest_is_detected(tmp_path: Path) -> None:
    root = write_tiny_bundle(tmp_path / "tiny")
    content = (root / "bundle.json").read_bytes()
    for at in range(0, len(content), 1 if FULL else 31):
        for bit in range(8):
            changed = bytes([content[at] ^ (1 << bit)])
            (root / "bundle.json").write_bytes(content[:at] + changed + content[at + 1 :])
            with pytest.raises(FoveateError):
                open_bundle(root)


def test_hostile_manifests(bundle: Path, capsys: Any) -> None:
    content = (bundle / "bundle.json").read_bytes()

    def work(mutation: Mutation) -> None:
        manifest_from_json(mutation.apply(content), "bundle.json")

    drawn = draw_mutations({"bundle.json": content}, seed=1, count=cases(2000))
    outcome = try_all(drawn, work, seconds=10)
    outcome.check("manifests", capsys)
    assert outcome.refused > outcome.tried // 2


def test_bundles_with_right_hashes(bundle: Path, capsys: Any) -> None:
    """Whatever a file holds: an answer, or an error that can be read."""
    names = sorted(open_bundle(bundle).manifest.files)
    names = [name for name in [*names, "bundle.json"] if name != "README.md"]
    contents = {name: (bundle / name).read_bytes() for name in names}

    def reset() -> None:
        for name, content in contents.items():
            (bundle / name).write_bytes(content)

    def work(mutation: Mutation) -> None:
        try:
            damaged = mutation.apply(contents[mutation.file])
            if mutation.file == "bundle.json":
                (bundle / "bundle.json").write_bytes(damaged)
            else:
                put(bundle, mutation.file, damaged)
            answer(bundle)
        finally:
            (bundle / mutation.file).write_bytes(contents[mutation.file])
            (bundle / "bundle.json").write_bytes(contents["bundle.json"])

    drawn = draw_mutations(contents, seed=2, count=cases(1200))
    outcome = try_all([*load_seeds("bundles"), *drawn], work, reset)
    outcome.check("bundles with right hashes", capsys)
