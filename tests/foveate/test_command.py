"""The command `foveate`: its help, what it imports, and that it is the commands of the floors."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.bundle import Bundle
from foveate.__main__ import WAY

ROOT = Path(__file__).parents[2]
COMMANDS = {name: module for panel in WAY.values() for name, (module, _) in panel.items()}
DOORS = {"engines": "engines.build", "calibrate": "calibration.calibrate"} | {
    **{name: f"engines.{name}" for name in ("targets", "estimate", "doctor", "inspect")},
    **{name: f"export.{name}" for name in ("tune", "build", "verify")},
    **{name: f"runtime.{name}" for name in ("ask", "chat", "watch", "label", "serve", "triton")},
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )


def test_help_shows_the_way_from_checkpoint_to_robot() -> None:
    done = run("-m", "foveate", "--help")
    assert done.returncode == 0, done.stderr
    places = [done.stdout.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert list(COMMANDS) == [
        *("targets", "estimate", "tune", "build", "verify", "calibrate"),
        *("engines", "doctor", "inspect", "ask", "chat", "watch", "label", "serve", "triton"),
    ]
    assert "--install-completion" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from foveate.__main__ import main\nsys.argv = ['foveate', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    imported = set(ast.literal_eval(done.stderr))
    assert "engines" in imported
    assert not imported & {"torch", "onnxruntime", "numpy", "runtime", "calibration", "export"}


@pytest.mark.parametrize("name", ["targets", "inspect", "ask", "watch"])
def test_a_command_is_the_one_of_its_floor(name: str) -> None:
    told = [run("-m", *door, "--help") for door in (("foveate", name), (DOORS[name],))]
    assert [done.returncode for done in told] == [0, 0], told
    first, second = (done.stdout.split("\n", 3)[3] for done in told)  # all but the usage
    assert first == second


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_door_of_the_same_function(name: str) -> None:
    holder = importlib.import_module(COMMANDS[name])
    assert holder.EXAMPLES
    door = ROOT / (DOORS[name].replace(".", "/") + ".py")
    source = (door if door.exists() else door.with_suffix("") / "__main__.py").read_text("utf-8")
    assert "run(main, EXAMPLES)" in source
    assert COMMANDS[name] == DOORS[name] or f"from {COMMANDS[name]} import" in source


def test_options_results_and_exit_codes_pass_through(language_bundle: Bundle) -> None:
    done = run("-m", "foveate", "inspect", str(language_bundle.root), "--json", "--trust")
    assert json.loads(done.stdout)["verified"] is False
    failed = run("-m", "foveate", "inspect", "nowhere")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: nowhere")


def test_a_command_that_is_not_there_is_told() -> None:
    done = run("-m", "foveate", "asc")
    assert done.returncode == 2
    assert "Did you mean 'ask'" in done.stderr


def test_without_pytorch_it_says_which_extra_has_it(tmp_path: Path) -> None:
    """A robot: the module is there, and what it imports is not."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no', name='torch')")
    done = run("-m", "foveate", "build", "--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: foveate build needs torch, which is not installed here. Run: "
        "pip install 'foveate[export]'\n"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [("foveate in", {"inspect"}), ("foveate inspect --tru", {"--trust"})],
)
def test_a_shell_completes_commands_and_options(line: str, expected: set[str]) -> None:
    code = "from foveate.__main__ import main; main()"
    done = run(
        *("-c", code),
        _FOVEATE_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(line.split()) - 1),
    )
    assert set(done.stdout.split()) == expected, done.stderr
