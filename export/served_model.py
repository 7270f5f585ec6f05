"""Run the command `python -m export.served_model`."""

from engines import cli
from export.language.served_model import EXAMPLES, main

if __name__ == "__main__":
    cli.run(main, EXAMPLES)
