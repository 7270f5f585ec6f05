"""Run the command `python -m export.build`."""

from engines import cli
from export.build.command import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
