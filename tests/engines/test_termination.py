"""A process that is asked to end removes what it was writing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from engines.staging import staged_directory
from engines.termination import end_in_order
with end_in_order(), staged_directory(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "bundle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert list(tmp_path.glob("bundle.partial-*"))
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())
