"""Run the command `python -m export.verify`."""

from engines import cli
from export.verify.command import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
