"""The command `python -m runtime.label`; `runtime.commands.label` holds it."""

from engines import cli
from runtime.commands.label import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
