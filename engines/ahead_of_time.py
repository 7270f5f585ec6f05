"""The old name of `python -m engines.install_trt_rtx`, kept for one release."""

from engines import cli
from engines.install_trt_rtx import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
