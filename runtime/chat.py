"""The command `python -m runtime.chat`; `runtime.commands.chat` holds it."""

from engines import cli
from runtime.commands.chat import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
