"""A process that is asked to end removes what it was writing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from engines.staging import staged_directory
from engines.termination import end_in_order
with end_in_order(), staged_directory(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def start(bundle: Path, *wrapper: str) -> subprocess.Popen[str]:
    """Run the script, which waits for a line of input once it has started to write."""
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", SCRIPT, str(bundle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path / "bundle") as process:
        assert list(tmp_path.glob("bundle.partial-*"))
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """A shell starts a script's background jobs with SIGINT ignored: Ctrl-C is not for them."""
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    with start(tmp_path / "bundle", *ignoring) as process:
        process.send_signal(signal.SIGINT)
        process.communicate("\n")
    assert process.returncode == 0
    assert (tmp_path / "bundle" / "weights").read_text() == "half"
