"""A bundle is written whole or not at all, and opens only as it was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from engines.bundle import open_bundle, write_bundle
from engines.errors import BundleError, FoveateError, OptionError
from engines.manifest import SCHEMA_VERSION, Manifest, checksum_of
from tests.tiny_bundle import tiny_manifest, write_tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "tiny")


def refusal(path: Path, kind: type[FoveateError] = BundleError, verify: bool = True) -> str:
    with pytest.raises(kind) as caught:
        open_bundle(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def edit_manifest(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(manifest | changes))


def test_what_is_written_opens_again(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest.model == "tiny"
    assert opened.preprocessing.height == 8
    assert opened.path("decoder/model.onnx").read_text() == "decoder/model.onnx"
    assert "README.md" in opened.manifest.files
    assert "python -m runtime.ask" in (bundle / "README.md").read_text()
    assert (bundle.stat().st_mode & 0o777) == (0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_graphs_and_decoders_are_found_by_what_they_are_for(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.vision() is opened.vision(2)
    assert opened.language_model() == opened.language_model("ort")
    with pytest.raises(OptionError, match=r"no vision graph with 64 visual tokens, only with 2"):
        opened.vision(64)
    with pytest.raises(OptionError, match=r'no decoder for the backend "vllm", only for ort'):
        opened.language_model("vllm")
    with pytest.raises(BundleError, match=r'has no file "x.bin"'):
        opened.path("x.bin")


def test_a_changed_file_is_told_with_both_digests(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("tokenizer.jsoN")
    message = refusal(bundle)
    assert "tokenizer.json was changed: its SHA-256 is " in message
    assert open_bundle(bundle, verify=False).manifest.model == "tiny"


def test_missing_shortened_and_added_files_are_told_together(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "vision.onnx").write_text("vis")
    (bundle / "decoder/extra.bin").write_text("?")
    message = refusal(bundle, verify=False)
    assert "3 files" in message
    assert "tokenizer.json is missing" in message
    assert "vision.onnx has 3 bytes, expected " in message
    assert "decoder/extra.bin was added" in message


def test_what_a_machine_keeps_for_itself_is_not_part_of_the_bundle(bundle: Path) -> None:
    opened = open_bundle(bundle)
    opened.local.mkdir()
    (opened.local / "vision.plan").write_text("a plan")
    open_bundle(bundle)


def test_links_out_of_the_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(bundle / "vision.onnx", outside)
    (bundle / "vision.onnx").symlink_to(outside)
    assert f"vision.onnx is a link to {outside}, outside the bundle" in refusal(bundle)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "./a", "a\\b", "C:/x", ""])
def test_paths_out_of_the_bundle_are_refused(bundle: Path, name: str) -> None:
    edit_manifest(bundle, files={name: {"sha256": "0" * 64, "bytes": 1}})
    assert "is not a path inside the bundle" in refusal(bundle)


def test_a_newer_schema_says_which_foveate_reads_it(bundle: Path) -> None:
    edit_manifest(
        bundle, schema_version=SCHEMA_VERSION + 1, versions={"foveate": "9.1.0"}, unknown=1
    )
    message = refusal(bundle)
    assert f"schema version {SCHEMA_VERSION + 1}" in message
    assert 'pip install "foveate>=9.1.0"' in message


def test_a_bundle_of_the_first_schema_opens(bundle: Path) -> None:
    """It has neither `shared` nor the field that says so."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["shared"]
    manifest |= {"schema_version": 1}
    manifest["checksum"] = checksum_of(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    opened = open_bundle(bundle)
    assert opened.stages(opened.vision()) == (opened.vision(),)


def test_problems_of_the_schema_are_listed_together_in_plain_words(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["vision"][0]["precision"] = "int3"
    manifest["preprocessing"]["height"] = 0
    del manifest["model"]
    manifest["colour"] = "blue"
    manifest["language_models"] = []
    manifest["schema_version"] = "one"
    manifest["files"]["vision.onnx"]["sha256"] = "abc"
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    message = refusal(bundle)
    assert "7 problems" in message
    assert "vision[0].precision is \"int3\", expected one of 'fp32', " in message
    assert "preprocessing.height is 0, expected greater than 0" in message
    assert "model is missing" in message
    assert "colour is not a field" in message
    assert "language_models is empty" in message
    assert 'schema_version is "one", expected a valid integer' in message
    assert 'files.vision.onnx.sha256 is "abc", expected 64 hexadecimal digits' in message


def test_a_file_that_is_named_must_be_listed(bundle: Path) -> None:
    edit_manifest(bundle, files={})
    message = refusal(bundle)
    assert 'vision[0].file is "vision.onnx", which is not among "files"' in message
    assert "4 problems" in message


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not JSON"), ("[]", "holds a JSON list"), ("\xff", "is not JSON")]
)
def test_a_manifest_that_is_no_object(bundle: Path, text: str, told: str) -> None:
    (bundle / "bundle.json").write_bytes(text.encode("latin-1"))
    assert told in refusal(bundle)


def test_what_is_not_a_bundle(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "holds no bundle.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")


def test_an_old_bundle_is_replaced_only_when_asked_and_only_by_a_whole_one(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"already holds a bundle. Pass --overwrite"):
        write_tiny_bundle(bundle)
    with pytest.raises(ZeroDivisionError), write_bundle(bundle, overwrite=True) as draft:
        draft.path("vision.onnx").write_text("new")
        assert open_bundle(bundle).manifest.model == "tiny"
        raise ZeroDivisionError
    assert open_bundle(bundle).manifest.model == "tiny"
    write_tiny_bundle(bundle, overwrite=True, model="second")
    assert open_bundle(bundle).manifest.model == "second"
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]


def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"is not a bundle, so it is not replaced"):
        write_tiny_bundle(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis/chapter.tex").exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    goal = tmp_path / "tiny"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with (
            pytest.raises(BundleError, match=r"No room to write .*tiny: .* is free on that disk"),
            write_bundle(goal) as draft,
        ):
            draft.path("vision.onnx").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_from_any_writer(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(BundleError, match=r"Nothing was left behind"), write_bundle(tmp_path / "t"):
        raise error
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_refused_before_any_work(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"about 1000000.0 GB is needed"),
        write_bundle(tmp_path / "t", expected_bytes=10**15),
    ):
        pytest.fail("the block must not run")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_bundle(tmp_path / "t") as draft:
        draft.path("a/b").write_text("")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_block_must_describe_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"without draft.describe"), write_bundle(tmp_path / "t"):
        pass
    with (
        pytest.raises(BundleError, match=r'text.embeddings is "embeddings.safetensors", which is'),
        write_bundle(tmp_path / "t") as draft,
    ):
        draft.describe(Manifest.model_validate(tiny_manifest()))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be written|is already there"):
        write_tiny_bundle(tmp_path / "file/tiny")


HOSTILE_FIELDS = {
    "vision.0.inputs": [],
    "vision.0.inputs.0.dtype": "float128",
    "vision.0.inputs.0.shape": ["batch", 3, -8, 8],
    "vision.0.patch_rows": 10**9,
    "vision.0.reducer.tokens": 10**9,
    "preprocessing.height": 10**9,
    "preprocessing.resize_width": 10**9,
    "preprocessing.mean": [float("nan"), 0, 0],
    "preprocessing.std": [0, 1, 1],
    "preprocessing.rescale_factor": float("inf"),
    "prompt.stop_token_ids": [],
    "prompt.image_token_id": -1,
    "prompt.chat_template": "x" * 300_000,
    "text.context_length": 2**60,
    "text.vocabulary": 2**60,
}


@pytest.mark.parametrize("field", HOSTILE_FIELDS)
def test_values_that_no_exporter_writes_are_refused(bundle: Path, field: str) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    at = manifest
    *path, last = [int(step) if step.isdecimal() else step for step in field.split(".")]
    for step in path:
        at = at[step]
    at[last] = HOSTILE_FIELDS[field]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert str(last) in refusal(bundle)


def test_a_manifest_of_many_levels_is_refused(bundle: Path) -> None:
    for levels in (900, 100_000):
        (bundle / "bundle.json").write_text('{"model": ' + "[" * levels + "]" * levels + "}")
        refusal(bundle)


def test_a_manifest_that_is_no_plain_file_is_refused(bundle: Path) -> None:
    (bundle / "bundle.json").unlink()
    os.mkfifo(bundle / "bundle.json")
    assert "is not a plain file" in refusal(bundle)


def test_a_manifest_without_end_is_refused(bundle: Path) -> None:
    with (bundle / "bundle.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert "expected at most" in refusal(bundle)


def test_links_that_lead_nowhere_are_refused(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    (bundle / "vision.onnx").symlink_to("vision.onnx")
    assert "vision.onnx is missing" in refusal(bundle)


def test_of_many_wrong_files_some_are_named(bundle: Path) -> None:
    for number in range(100):
        (bundle / f"extra{number}").write_text("")
    assert "100 files" in refusal(bundle)
    assert len(refusal(bundle)) < 2000
