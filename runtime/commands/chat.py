"""Talk with a bundle about pictures in a terminal: `python -m runtime.chat`.

A line that begins with a slash is a command. A follow-up question computes only its own tokens;
`/tokens` shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.cli import JsonOption, print_json
from engines.errors import FoveateError, OptionError
from engines.memory.context_length import ContextNeed
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions, SystemOption

if TYPE_CHECKING:
    from runtime.conversation import Conversation
    from runtime.model import Answer

EXAMPLES = (
    "`python -m runtime.chat build/pocket photo.jpg`",
    "`python -m runtime.chat build/pocket --resume yesterday.json`",
    "`python -m runtime.chat build/pocket photo.jpg --json < questions.txt`",
)
HELP = """\
/image FILE   show one more picture with the next question
/frame FILE   put a new picture in the place of the last, forgetting what was said about it
/tokens       what the conversation takes of the context, and what the last question cost
/save FILE    write the conversation to a file; --resume takes it up again
/reset        forget everything
/quit         end (as does Ctrl-D)"""


class Chat:
    """A conversation that is led by lines of text.

    Attributes:
        conversation: what is said.
        options: how answers are written.
        answers: every answer so far, with its question.
    """

    def __init__(self, conversation: Conversation, options: GenerationOptions, quiet: bool) -> None:
        self.conversation = conversation
        self.options = options
        self.answers: list[tuple[str, Answer]] = []
        self._quiet = quiet

    def hear(self, line: str) -> bool:
        """Obey a command or answer a question; False when the chat is to end.

        Raises:
            FoveateError: what the line asks for cannot be done; the conversation is as it was.
        """
        line = line.strip()
        if line.startswith("/"):
            return self._obey(line)
        if line:
            self._answer(line)
        return True

    def _answer(self, question: str) -> None:
        show = None if self._quiet else _write
        dropped = self.conversation.dropped
        answer = self.conversation.ask(question, self.options, show)
        self.answers.append((question, answer))
        if not self._quiet:
            print()
        if self.conversation.dropped > dropped:
            _tell(f"(the context is full: {self.conversation.dropped} exchanges were dropped)")

    def _obey(self, line: str) -> bool:
        from runtime.vision.pictures import load_picture

        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in {"/image", "/frame", "/save"} and not rest:
            raise OptionError(f"{name} needs a file: {name} FILE.")
        if name == "/image":
            self.conversation.show(load_picture(rest), rest)
        elif name == "/frame":
            self.conversation.replace_image(load_picture(rest), rest)
        elif name == "/save":
            from runtime.transcript import save_conversation

            save_conversation(self.conversation, rest)
            _tell(f"saved to {rest}")
        elif name == "/tokens":
            self._tell_tokens()
        elif name == "/reset":
            self.conversation.reset()
        elif name == "/help":
            _tell(HELP)
        elif name != "/quit":
            raise OptionError(f"There is no command {name}.\n{HELP}")
        return name != "/quit"

    def _tell_tokens(self) -> None:
        conversation = self.conversation
        visual = sum(len(image.tokens) for image in conversation.images)
        told = (
            f"{conversation.count_positions()} of {conversation.model.language.context_length} "
            f"positions, {visual} of them visual tokens"
        )
        if self.answers:
            _, last = self.answers[-1]
            cost = f"computed {last.computed_tokens} and reused {last.reused_tokens}"
            if last.reused_tokens is None:
                cost = f"took {last.prompt_tokens}; the server does not say what it reused"
            told += f"; the last question {cost}"
        _tell(told)


def document_from_answers(answers: Iterable[tuple[str, Answer]]) -> dict[str, Any]:
    """Return a chat as the JSON object that `--json` prints."""
    turns = [
        {
            "question": question,
            "answer": answer.text,
            "finish": answer.finish,
            "visual_tokens": answer.visual_tokens,
            "prompt_tokens": answer.prompt_tokens,
            "computed_tokens": answer.computed_tokens,
            "reused_tokens": answer.reused_tokens,
            "answer_tokens": len(answer.token_ids),
            "milliseconds": {stage: round(ms, 3) for stage, ms in answer.milliseconds.items()},
        }
        for question, answer in answers
    ]
    return {"turns": turns}


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    image: Annotated[
        Path | None, typer.Argument(help="Picture to begin with; `/image` shows more.")
    ] = None,
    *,
    resume: Annotated[
        Path | None, typer.Option(help="Take up a conversation that `/save` wrote.")
    ] = None,
    system: SystemOption = None,
    json_output: JsonOption = False,
    model: ModelOptions,
    generation: GenerationOptions,
) -> int:
    """Talk with a bundle about pictures.

    Questions come from stdin, one a line; `/help` lists the commands. From a pipe, the first line
    that cannot be answered ends the chat with exit code 2.
    """
    from runtime.conversation import Conversation
    from runtime.transcript import restore_conversation
    from runtime.vision.pictures import load_picture

    picture = load_picture(image) if image is not None else None
    need = ContextNeed(answer_tokens=generation.max_tokens).with_text(system)
    with model.open(bundle, need=need) as opened:
        conversation = Conversation(opened, system)
        if resume is not None:
            conversation = restore_conversation(opened, resume)
        if picture is not None:
            conversation.show(picture, str(image))
        chat = Chat(conversation, generation, quiet=json_output)
        _converse(chat)
    if json_output:
        print_json(document_from_answers(chat.answers))
    return 0


def _converse(chat: Chat) -> None:
    """Hear every line; at a terminal a line that fails is told and the chat goes on."""
    if sys.stdin is None:
        raise OptionError("Standard input is closed. Pipe questions into it, one a line.")
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _tell(HELP)
    for line in _lines(at_terminal):
        try:
            if not chat.hear(line):
                return
        except FoveateError as error:
            if not at_terminal:
                raise
            _tell(f"\nerror: {error}")
        except KeyboardInterrupt:
            _tell("\n(stopped)")


def _lines(at_terminal: bool) -> Iterator[str]:
    if not at_terminal:
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise OptionError(
                f"A line of standard input is not UTF-8: {error}. Convert the questions with iconv."
            ) from error
        return
    import readline  # noqa: F401 - gives `input` a history and arrow keys

    while True:
        try:
            yield input("> ")
        except EOFError:
            _tell("")
            return


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
