"""A secret is sent and never shown."""

from __future__ import annotations

import copy
import pickle

import pytest

from engines.errors import OptionError
from engines.secret import NO_SECRET, Secret


def test_it_is_not_shown() -> None:
    secret = Secret("hush")
    shown = (repr(secret), str(secret), f"{secret}", f"{[secret]}", "%s" % secret)  # noqa: UP031
    assert not any("hush" in text for text in shown)
    assert secret.reveal() == "hush"
    with pytest.raises(TypeError, match="not written to disk"):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.deepcopy(secret)


def test_it_is_taken_out_of_what_others_say() -> None:
    assert Secret("hush").redact("wrong key hush.") == "wrong key ********."
    assert NO_SECRET.redact("as it is") == "as it is"


def test_there_may_be_none() -> None:
    assert Secret("x") and not Secret("")
    assert Secret("x") == Secret("x") != Secret("y")
    assert len({Secret("x"), Secret("x")}) == 1


@pytest.mark.parametrize("text", ["hush\n", "hush\r", "hu\x00sh", "hush ", "hush\u20ac"])
def test_what_no_header_can_hold(text: str) -> None:
    with pytest.raises(OptionError, match="The key holds a line break") as told:
        Secret(text).require_sendable("The key")
    assert "hu" not in str(told.value)


@pytest.mark.parametrize("text", ["", "sk-1", "two words", "h\xfcsh"])
def test_what_a_header_can_hold(text: str) -> None:
    Secret(text).require_sendable("The key")
