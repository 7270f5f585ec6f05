"""The command `python -m runtime.serve`; `runtime.commands.serve` holds it."""

from engines import cli
from runtime.commands.serve import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
