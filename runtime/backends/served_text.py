"""Write a conversation as the text that a server tokenizes, and check that it gives our own prompt.

TensorRT-LLM tokenizes the text in one piece, with the special tokens that the tokenizer adds by
itself, and `<image>` in it is the place of a picture. What it will read is computed here and
compared with the bundle's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from engines.errors import OptionError
from engines.manifest import Prompt
from runtime.backends.served_prompt import control_tokens, refuse_control_tokens
from runtime.language.prompt import PromptWriter, Turn


class ServedText:
    """Writes conversations for a server that has the bundle's tokenizer and no template."""

    def __init__(self, writer: PromptWriter, prompt: Prompt) -> None:
        self._writer = writer
        self._bos_token = prompt.bos_token or ""
        self._control_tokens = control_tokens(writer)

    def text(self, turns: Sequence[Turn]) -> str:
        """Return the whole conversation, without what the server's tokenizer puts before it.

        Raises:
            OptionError: words that the server would take for control tokens, or a prompt that its
                tokenizer would read differently.
        """
        for turn in turns:
            refuse_control_tokens(turn.text, self._control_tokens)
        ids = self._writer.ids(turns).tolist()  # first: it says what is wrong with the turns
        rendered = self._writer.render(turns)
        for text in (rendered, rendered.removeprefix(self._bos_token)):
            if self._writer.tokenizer.encode(text, add_special_tokens=True).ids == ids:
                return text
        raise OptionError(
            "TensorRT-LLM would read this conversation as another prompt: it tokenizes the text "
            "in one piece and adds the tokenizer's own special tokens, which this bundle's chat "
            "template does not allow for. Ask a vLLM server with --backend vllm, or answer here "
            "with --backend ort."
        )
