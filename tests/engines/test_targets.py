"""Targets: every number has a source, a user's file is merged, mistakes are told together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import targets as targets_module
from engines.cli import make_app
from engines.errors import OptionError
from engines.targets import Target, find_target, load_targets

CUDA_NAMES = [
    *("jetson-orin", "jetson-orin-nx", "jetson-orin-nano", "jetson-thor"),
    *("t4", "a10", "l4", "a100", "h100", "h200", "b200"),
    *("rtx-4090", "rtx-6000-ada", "rtx-5090"),
]
NAMES = [*CUDA_NAMES, "x86", "cpu"]
NUMBERS = ("sm", "memory_gb", "bandwidth_gb_s", "fp16_tflops", "int8_tops", "workspace_mb")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def run_cli(*arguments: str):
    return CliRunner().invoke(make_app(targets_module.main), list(arguments))


def test_all_promised_targets_are_there() -> None:
    assert set(load_targets()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    target = find_target(name)
    for field in NUMBERS:
        if getattr(target, field) is not None:
            source = target.sources[field]
            assert source.split(":")[0] in ("datasheet", "derived", "report", "choice"), source
            assert len(source.split(":", 1)[1].strip()) > 5


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_gpu_numbers_are_plausible(name: str) -> None:
    target = find_target(name)
    assert target.fp16_tflops and target.int8_tops and target.bandwidth_gb_s and target.memory_gb
    assert 1.9 < target.int8_tops / target.fp16_tflops < 4.1
    # More than 20 operations for each byte, fewer than 1000: anything else is a slipped unit.
    assert 20 < target.fp16_tflops * 1e3 / target.bandwidth_gb_s < 1000
    assert target.workspace_mb and target.workspace_mb <= target.memory_gb * 1024 / 4


def test_numbers_inherited_from_another_device_keep_their_own_source() -> None:
    nano = find_target("jetson-orin-nano")
    assert "Nano" in nano.sources["memory_gb"]
    assert nano.sources["sm"] == find_target("jetson-orin").sources["sm"]
    assert nano.compute_capability == (8, 7)


def test_cpu_target_is_what_the_exporter_relies_on() -> None:
    cpu = find_target("cpu")
    assert (cpu.engine, cpu.precisions, cpu.default_precision) == (
        "ort",
        ("fp32", "int8", "mixed"),
        "fp32",
    )
    assert not cpu.needs_cuda and cpu.compute_capability is None


def test_nearest_name_is_offered() -> None:
    with pytest.raises(OptionError, match=r"Did you mean jetson-orin-nano\?.*rtx-4090"):
        find_target("jetson_orin_nan")


def test_user_file_adds_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.toml",
        """
        [my-robot]
        like = "jetson-orin"
        title = "Rover, 32 GB"
        memory_gb = 32
        [cpu]
        title = "our industrial PC"
        """,
    )
    known = load_targets(path)
    assert (known["my-robot"].sm, known["my-robot"].memory_gb) == (87, 32)
    assert known["cpu"].title == "our industrial PC" and known["cpu"].engine == "ort"
    assert load_targets()["cpu"].title != "our industrial PC"


def test_user_file_problems_are_told_together(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.toml",
        """
        [one]
        like = "cpu"
        precisions = ["fp64"]
        memory_gb = -1
        [two]
        like = "nowhere"
        [three]
        like = "cpu"
        default_precision = "int8"
        """,
    )
    with pytest.raises(OptionError) as caught:
        load_targets(path)
    message = str(caught.value)
    for part in ("bad.toml", "[one]", "precisions", "memory_gb", '"nowhere"', "'int8'"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a", "not valid TOML"),
        ("sm = 87", "outside a table"),
        ("[a]\nlike = 'b'\n[b]\nlike = 'a'", "not another target"),
        ("[a]\ntitle = 'x'", "engine: Field required"),
        ("[cpu]\ncolour = 'red'", "colour"),
        ("[cpu]\nengine = 'tensorrt'", "needs sm and workspace_mb"),
    ],
)
def test_user_file_mistakes(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        load_targets(write(tmp_path / "bad.toml", text))


def test_missing_user_file() -> None:
    with pytest.raises(OptionError, match=r"--targets nowhere\.toml: cannot be read"):
        load_targets(Path("nowhere.toml"))


def test_precision_the_target_lacks() -> None:
    without = {name for name, one in load_targets().items() if "fp8" not in one.precisions}
    assert without == {
        *(name for name in CUDA_NAMES if (load_targets()[name].sm or 0) < 89),
        *("x86", "cpu"),
    }
    with pytest.raises(OptionError, match=r"fp8: target jetson-orin .* takes fp32, fp16, int8"):
        find_target("jetson-orin").check_precision("fp8")
    assert find_target("jetson-orin").check_precision("int8") == "int8"


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        ("10.3.0", None),
        ("10.16.2.10", None),
        ("11.4.0", None),
        ("10.2.0", "needs TensorRT 10.3"),
        ("9.3", "needs TensorRT 10.3"),
        ("10.13.3.9", "without kernels for sm_87"),
    ],
)
def test_tensorrt_versions_compare_as_numbers(version: str, complaint: str | None) -> None:
    found = find_target("jetson-orin").explain_unsupported_tensorrt(version)
    assert (found is None) if complaint is None else complaint in (found or "")


def test_json_is_one_object_with_sources() -> None:
    result = run_cli("--json")
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert Target(**listed["l4"]) == find_target("l4")


def test_table_lists_every_target() -> None:
    result = run_cli()
    assert result.exit_code == 0
    assert all(name in result.stdout for name in NAMES)


def test_cli_mistake_exits_with_two() -> None:
    result = run_cli("--targets", "nowhere.toml")
    assert result.exit_code == 2 and "cannot be read" in result.stderr


@pytest.mark.parametrize("columns", ["80", "100", "160"])
def test_no_number_of_the_table_is_cut_short(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    printed = run_cli().stdout
    assert "…" not in printed
    for number in ("204.8", "660.6", "4800", "jetson-orin-nano", "tensorrt-rtx"):
        assert number in printed
    assert ("fp16 fp32 int8 mixed" in printed) == (columns == "160")
