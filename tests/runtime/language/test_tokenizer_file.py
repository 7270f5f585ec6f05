"""Tokenizers of strangers: texts grow by a bounded factor, and a panic is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engines.errors import BundleError
from runtime.language.tokenizer_file import open_tokenizer, without_panic


def words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))


def refusal(tokenizer: Tokenizer, tmp_path: Path) -> str:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError) as caught:
        open_tokenizer(tmp_path / "tokenizer.json", BundleError)
    return str(caught.value)


@pytest.mark.parametrize("pattern", ["a", Regex("")])
def test_a_chain_that_doubles_is_refused(tmp_path: Path, pattern: object) -> None:
    tokenizer = words()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(pattern, "aa")] * 60)
    assert "more than 64 times as long" in refusal(tokenizer, tmp_path)


def test_a_decoder_that_doubles_is_refused(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("a", "aa")] * 60)
    assert "more than 64 times as long" in refusal(tokenizer, tmp_path)


def test_usual_normalizers_pass(tmp_path: Path) -> None:
    tokenizer = words()
    usual = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFKC()]
    tokenizer.normalizer = normalizers.Sequence([*usual, normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(tmp_path / "tokenizer.json", BundleError).encode("a").ids


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 5}', "[" * 100_000])
def test_what_is_no_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json", BundleError)


def test_what_is_no_plain_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="not a plain file"):
        open_tokenizer(tmp_path / "tokenizer.json", BundleError)


def test_a_panic_is_an_error() -> None:
    """A regular expression that gives up panics in Rust, past `except Exception`."""
    tokenizer = words()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    with pytest.raises(BundleError, match="retry-limit"):
        without_panic(lambda: tokenizer.encode("a" * 30 + "b"), lambda p: BundleError(str(p)))
    with pytest.raises(KeyboardInterrupt):
        without_panic(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), lambda p: BundleError())


def test_a_file_of_many_levels_is_told(tmp_path: Path) -> None:
    document = json.loads(words().to_str())
    text = json.dumps(document).replace('"normalizer": null', '"normalizer": ' + "[" * 10**5)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json", BundleError)
