"""Keep a key as a text that no message, log or traceback shows."""

from __future__ import annotations

import re

from engines.errors import OptionError

_SHOWN = "********"
_SENDABLE = re.compile(r"[!-~\xa1-\xff]([ -~\xa0-\xff]*[!-~\xa1-\xff])?")
"""Latin-1 without control characters, and no blank at an end: what an HTTP header can hold."""


class Secret:
    """Holds a secret; printing, formatting or logging it shows stars."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __bool__(self) -> bool:
        """Return whether there is one: an empty environment variable gives none."""
        return bool(self._text)

    def __repr__(self) -> str:
        return _SHOWN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str:
        raise TypeError("A secret is not written to disk or sent to another process.")

    def reveal(self) -> str:
        """Return the secret itself, for the one who must send it."""
        return self._text

    def redact(self, text: str) -> str:
        """Return a text of somebody else's with the secret taken out of it."""
        return text.replace(self._text, _SHOWN) if self._text else text

    def require_sendable(self, name: str) -> None:
        """Check that it can be sent in an HTTP header.

        Args:
            name: what the user calls it.

        Raises:
            OptionError: it holds a line break or a character that a header cannot. The message does
                not hold it.
        """
        if self._text and not _SENDABLE.fullmatch(self._text):
            raise OptionError(
                f"{name} holds a line break, a blank at an end or a character that is not Latin-1, "
                "and cannot be sent in a header. Give the key alone; a file it was read from may "
                "end in a line break."
            )


NO_SECRET = Secret("")
