"""Ask a bundle about a picture: `python -m examples.ask build/pocket PICTURE "QUESTION"`."""

from __future__ import annotations

import sys

from runtime import open_model


def main(bundle: str, picture: str, *questions: str) -> None:
    """Answer each question; the picture's tokens are computed once."""
    with open_model(bundle) as model:
        for question in questions:
            answer = model.ask(picture, question)
            print(f"{question} {answer.text}")
            print(f"  {answer.visual_tokens} visual tokens, {answer.milliseconds['total']:.0f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
