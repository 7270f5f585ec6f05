"""The command `python -m runtime.ask`; `runtime.commands.ask` holds it."""

from engines import cli
from runtime.commands.ask import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
