"""Reading `tegrastats`: lines recorded on Jetsons by their owners, and a stand-in for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from engines.errors import OptionError
from runtime.camera.budgets.power import Tegrastats, watts_from_line

# Published by owners of such boards; CPU and temperature columns are shortened where they repeat.
ORIN_NANO_JETPACK_6 = (
    "09-21-2025 15:38:17 RAM 3645/7620MB (lfb 63x4MB) SWAP 236/3810MB (cached 0MB) "
    "CPU [1%@729,1%@729,4%@729,1%@729,0%@729,0%@729] EMC_FREQ 0%@204 GR3D_FREQ 0%@[305] NVDEC off "
    "NVJPG off NVJPG1 off VIC off OFA off APE 200 cpu@44.125C soc2@43.375C soc0@42.125C "
    "gpu@44.531C tj@44.531C soc1@43.156C VDD_IN 2957mW/2957mW VDD_CPU_GPU_CV 486mW/486mW "
    "VDD_SOC 1012mW/1012mW"
)
ORIN_NX_JETPACK_7 = (
    "09-01-2026 09:25:18 RAM 5739/7546MB (lfb 1x2MB) SWAP 2047/2048MB (cached 209MB) "
    "CPU [72%@1728,75%@1728,88%@1728] GR3D_FREQ 33% cpu@50C/50C tj@50C/50C "
    "VDD_IN 9761mW/9761mW/9761mW VDD_CPU_GPU_CV 4238mW/4238mW/4238mW VDD_SOC 1825mW/1825mW/1825mW"
)
AGX_ORIN_JETPACK_6 = (
    "09-01-2025 10:55:25 RAM 1313/30697MB (lfb 37x4MB) SWAP 0/15348MB (cached 0MB) "
    "CPU [0%@729,0%@729,off,off] GR3D_FREQ 0% cpu@43.343C soc2@39.812C tj@43.343C "
    "VDD_GPU_SOC 1995mW/1995mW VDD_CPU_CV 0mW/0mW VIN_SYS_5V0 2524mW/2524mW"
)
AGX_ORIN_WITH_MEMORY = (
    "GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 CPU@44.562C GPU@-256C tj@44.343C VDD_GPU_SOC "
    "2340mW/2340mW VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO "
    "301mW/301mW NC 0mW/0mW"
)
THOR_JETPACK_7 = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 "
    "GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 VIC off APE 300 cpu@37.343C tj@38.875C gpu@38.875C "
    "VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW "
    "VIN 19780mW/19780mW"
)
THOR_IDLE_GPU = (
    "05-14-2026 21:36:35 RAM 26063/125772MB (lfb 35x4MB) VDD_GPU -392mW/-392mW "
    "VDD_CPU_SOC_MSS 3924mW/3835mW VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW"
)


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        (ORIN_NANO_JETPACK_6, 2.957),
        (ORIN_NX_JETPACK_7, 9.761),
        (AGX_ORIN_JETPACK_6, 1.995 + 0.0 + 2.524),
        (AGX_ORIN_WITH_MEMORY, 2.340 + 0.390 + 4.025),  # its VDDQ is a part of VIN_SYS
        (THOR_JETPACK_7, 19.780),
        (THOR_IDLE_GPU, 15.004),
        ("VDD_GPU 5517mW VDD_CPU_SOC_MSS 7484mW VIN_SYS_5V0 6309mW VIN 28548mW", 28.548),
        ("VDD_IN 4542mW/4000mW VDD_SOC 1286mW/1200mW", 4.542),  # now, not the mean
        ("RAM 1313/30697MB (lfb 37x4MB) GR3D_FREQ 0%", None),  # not told to this user
        ("VDD_GPU_SOC 1995mW/1995mW VDD_CPU_CV 0mW/0mW", None),  # a part is missing
        ("", None),
    ],
)
def test_lines_of_jetsons(line: str, watts: float | None) -> None:
    assert watts_from_line(line) == (None if watts is None else pytest.approx(watts))


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called tegrastats that prints a file of lines and waits."""
    program = tmp_path / "tegrastats"
    program.write_text(f'#!/bin/sh\ncat "{tmp_path}/lines"\nexec sleep 30\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "lines"


def test_readings_are_averaged_until_they_are_taken(play: Path) -> None:
    play.write_text(f"{ORIN_NANO_JETPACK_6}\nnoise\n{ORIN_NX_JETPACK_7}\n")
    with Tegrastats() as meter:
        meter._thread.join(timeout=0.2)  # it is waiting in the program: both lines have been read
        assert meter.take_watts() == pytest.approx((2.957 + 9.761) / 2)
        assert meter.take_watts() is None
        process = meter._process
    assert process.poll() is not None
    meter.close()


def test_a_program_that_tells_no_power_is_refused(play: Path) -> None:
    play.write_text("RAM 1313/30697MB GR3D_FREQ 0%\n")
    play.with_name("tegrastats").write_text(f'#!/bin/sh\ncat "{play}"\n')
    with pytest.raises(OptionError, match=r"'RAM 1313/30697MB GR3D_FREQ 0%'.* try with sudo"):
        Tegrastats()


def test_without_it_another_goal_is_named() -> None:
    with pytest.raises(OptionError, match=r"on every Jetson .*--latency-target"):
        Tegrastats(("tegrastats-that-is-not-there",))
