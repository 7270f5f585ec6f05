"""Write the language model of a LLaVA checkpoint as a directory that a server takes.

The vision tower stays on the robot, which sends visual tokens. The server must have the language
model of the same checkpoint, because LLaVA's training has changed it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from engines import cli
from engines.errors import OptionError
from engines.llm_words import SERVERS
from engines.staging import staged_directory
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.language.llava_next_model import OPTIONS_FILE, write_llava_next

SERVER_OPTIONS = ("--enable-prompt-embeds", "--chat-template-content-format", "openai")
"""What a vLLM server needs to be asked by `runtime.ask --llm-url`."""
EXAMPLES = (
    "`python -m export.served_model llava-hf/llava-1.5-7b-hf build/llava-llm`",
    "`python -m runtime.ask build/llava photo.jpg --llm-url http://10.0.0.5:8000/v1 ...`",
)


def write_served_model(checkpoint: Checkpoint, out: Path, server: str = SERVERS[0]) -> None:
    """Write the language model of an opened checkpoint, whole or not at all.

    Args:
        checkpoint: an opened LLaVA checkpoint.
        out: the directory to write.
        server: what will serve it: ``"vllm"`` or ``"trtllm"``.

    Raises:
        OptionError: something is there already, or it cannot be written.
        CheckpointError: that server cannot take the checkpoint.
    """
    if server not in SERVERS:
        raise OptionError(f"--server {server}: expected one of {', '.join(SERVERS)}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError(f"{out} is already there. Remove it, or choose another place.")
    with staged_directory(out, OptionError) as staged:
        if server == "trtllm":
            write_llava_next(checkpoint, staged)
        else:
            checkpoint.write_language_model(staged)
            (staged / "chat_template.jinja").write_text(checkpoint.chat_template(), "utf-8")
        for file in staged.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone; a server is often another


def serving_command(out: Path, server: str = SERVERS[0]) -> str:
    """Return the command that serves the directory."""
    if server == "trtllm":
        options = ("--extra_llm_api_options", str(out / OPTIONS_FILE))
        return shlex.join(("trtllm-serve", str(out), *options))
    return shlex.join(("vllm", "serve", str(out), *SERVER_OPTIONS))


def main(
    model: Annotated[
        str, typer.Argument(help="LLaVA checkpoint: a directory or a Hugging Face name.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    server: Annotated[
        str, typer.Option(help="What will serve it: vllm, or trtllm (TensorRT-LLM).")
    ] = SERVERS[0],
    as_json: cli.JsonOption = False,
) -> None:
    """Write the language model of a checkpoint for a server, and say how to serve it."""
    write_served_model(open_checkpoint(model), out, server)
    command = serving_command(out, server)
    if as_json:
        cli.print_json({"directory": str(out), "serve": command})
        return
    print(f"{out}\n\nNext: {command}")
