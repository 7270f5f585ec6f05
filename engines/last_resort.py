"""Report an unexpected exception of a command: one paragraph on stderr, and a file for a report.

The file is in the temporary directory and has the traceback, the versions and the command line.
Neither has a key, token or password that was given on the command line, in an address or in the
environment.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from engines import __version__

EXIT_CODE = 70
"""What a command ends with: EX_SOFTWARE of sysexits.h."""

_HIDDEN = "***"
_SECRET_OPTION = re.compile(
    r"--(?:[\w-]+-)?(?:key|token|secret|password)(?:=(?P<value>.*))?", re.DOTALL
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:\w*KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)")
_IN_ADDRESS = re.compile(
    r"(?<=://)[^/\s@'\"]+@|(?<=[?&])(\w*(?:key|token|secret|password)=)[^&\s'\"]+"
)
_LONG = 8
"""Characters from which a secret is not taken for a part of another word."""
_MOST_CHARACTERS = 1_000_000
_PACKAGES = (
    "numpy", "onnxruntime", "pillow", "pydantic", "tokenizers", "typer", "av", "rosbags",
    "llguidance", "openvino", "onnx", "torch", "transformers",
)  # fmt: skip


def tell_of_defect(error: BaseException) -> int:
    """Say on stderr that this is a defect and where the report is; return the exit code."""
    redaction = _Redaction(sys.argv, os.environ)
    try:
        handle, path = tempfile.mkstemp(prefix="foveate-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redaction.applied_to(_report(error))[:_MOST_CHARACTERS])
        report = (
            f"{path} holds what a report about it needs, without keys and passwords: please attach "
            "it"
        )
    except OSError as refusal:
        report = f"No file for a report could be written ({refusal})"
    what = " ".join(redaction.applied_to(_described(error)).split())
    print(
        f"internal error: {what[:500]}{_place_of(error)}. This is a defect of Foveate, whatever "
        f"the input was. {report}.",
        file=sys.stderr,
    )
    return EXIT_CODE


def tell_of_threads() -> None:
    """Let an exception that ends a thread be told of in the same way; the process goes on."""

    def tell(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            tell_of_defect(ended.exc_value)

    threading.excepthook = tell


class _Redaction:
    """Takes out of a text what was given as a secret."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        values = {*_secret_arguments(arguments)} | {
            value for name, value in environment.items() if _SECRET_VARIABLE.search(name.upper())
        }
        forms = {form for value in values for form in _forms_of(value) if form.strip()}
        self._forms = sorted(forms, key=len, reverse=True)

    def applied_to(self, text: str) -> str:
        """Return the text without them."""
        for form in self._forms:
            if len(form) >= _LONG:
                text = text.replace(form, _HIDDEN)
            else:
                text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", _HIDDEN, text)
        return _IN_ADDRESS.sub(lambda found: (found[1] or "") + _HIDDEN, text)


def _secret_arguments(arguments: Sequence[str]) -> Iterator[str]:
    for at, argument in enumerate(arguments):
        found = _SECRET_OPTION.fullmatch(argument)
        if found is not None and found["value"] is not None:
            yield found["value"]
        elif found is not None:
            yield from arguments[at + 1 : at + 2]


def _forms_of(secret: str) -> Iterator[str]:
    """Yield a secret as messages may hold it: as it is, escaped, or a line of it."""
    yield from (secret, secret.strip(), repr(secret)[1:-1], json.dumps(secret)[1:-1])
    yield quote(secret, errors="surrogateescape")
    yield from secret.splitlines()


def _report(error: BaseException) -> str:
    return "\n".join(
        [
            f"foveate {__version__}, Python {platform.python_version()}, {platform.platform()}",
            ", ".join(_versions()),
            f"command line: {sys.argv!r}",
            "",
            *traceback.format_exception(type(error), error, error.__traceback__),
        ]
    )


def _versions() -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, version

    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _described(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip().rstrip(".")


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
