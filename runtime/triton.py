"""The command `python -m runtime.triton`; `runtime.commands.triton` holds it."""

from engines import cli
from runtime.commands.triton import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
