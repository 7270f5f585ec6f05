"""Makes the modules of pocket-llava importable: scenes, questions and training are shared."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "pocket-llava"))
