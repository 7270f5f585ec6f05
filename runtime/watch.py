"""The command `python -m runtime.watch`; `runtime.commands.watch` holds it."""

from engines import cli
from runtime.commands.watch import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
