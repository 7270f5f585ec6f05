"""Run the command `python -m export.tune`."""

from engines import cli
from export.tune.command import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
