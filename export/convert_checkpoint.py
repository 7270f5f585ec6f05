"""The command `python -m export.convert_checkpoint`."""

from engines import cli
from export.checkpoint.convert_command import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
