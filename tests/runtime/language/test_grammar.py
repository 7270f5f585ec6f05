"""Answers of a given form: always of that form, and chosen by the model."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.option_groups import spread
from runtime.camera.answering import FrameAnswerer
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.grammar import Grammar, GrammarTokens
from runtime.language.parts import Logits
from runtime.language.prompt import Turn
from runtime.language.sampling import Sampling
from runtime.model import Model, open_model

pytest.importorskip("llguidance", reason="llguidance: the extra `constrained`")
SCHEMA = {
    "type": "object",
    "properties": {"seen": {"type": "boolean"}, "count": {"type": "integer", "maximum": 99}},
    "required": ["seen", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(language_bundle: Bundle) -> Iterator[Model]:
    with open_model(language_bundle, threads=1) as opened:
        yield opened


def answer(model: Model, grammar: Grammar, seed: int = 0, temperature: float = 1.0) -> Any:
    options = GenerationOptions(
        max_tokens=60, sampling=Sampling(temperature, seed=seed), grammar=grammar
    )
    return model.answer([Turn("user", f"Is it {seed}?")], [], options)


def test_the_answer_is_one_of_the_choices(model: Model) -> None:
    choices = ("left", "right", "stop before the door")
    said = [answer(model, Grammar(choices), seed, temperature=3.0) for seed in range(30)]
    assert {given.text for given in said} == set(choices)
    assert {given.finish for given in said} == {"complete"}


def test_what_is_said_of_a_frame_is_one_of_the_choices(model: Model) -> None:
    answerer = FrameAnswerer(model, GenerationOptions(grammar=Grammar(("clear", "blocked"))))
    visual = model.encoder.encode([np.zeros((8, 8, 3), np.uint8)])
    said = answerer.answer(visual, "Is the way free?", lambda: None, lambda: False)
    assert said.text in ("clear", "blocked")


def test_the_model_chooses(model: Model) -> None:
    """Of two answers of one token each, the one with the larger logit."""
    logits = model.context.prefill(model.writer.parts([Turn("user", "Is it 0?")], []))
    known = model.writer.tokenizer.token_to_id
    ranked = sorted("abcdefghijklmnopqrstuvwxyz", key=lambda letter: -logits[known(letter)])
    assert logits[known(ranked[0])] > logits[known("Ġ")]  # it would rather not begin with a blank
    given = answer(model, Grammar((ranked[9], ranked[0], ranked[5])), temperature=0.0)
    assert given.text == ranked[0]


def test_the_answer_follows_the_schema(model: Model) -> None:
    grammar = Grammar(json_schema=json.dumps(SCHEMA))
    for seed in range(10):
        given = answer(model, grammar, seed, temperature=0.7)
        if given.finish == "max_tokens":  # random weights like blanks
            continue
        document = json.loads(given.text)
        assert set(document) == {"seen", "count"}
        assert isinstance(document["seen"], bool)
        assert document["count"] <= 99


def test_a_vocabulary_of_words(model: Model) -> None:
    """The bundled checkpoint has one: a blank goes before each word when it is written."""
    words = ["</s>", "<unk>", "yes", "no", "left", "of", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokens = GrammarTokens(tokenizer, [0])
    constraint = tokens.start(Grammar(("yes", "left of")))
    zeros = np.zeros(len(words), np.float32)
    allowed = np.flatnonzero(np.isfinite(constraint.mask(zeros)))
    assert [words[at] for at in allowed] == ["yes", "left"]
    constraint.accept(words.index("left"))
    assert not constraint.complete
    assert [words[at] for at in np.flatnonzero(np.isfinite(constraint.mask(zeros)))] == ["of"]
    constraint.accept(words.index("of"))
    assert constraint.complete
    with pytest.raises(OptionError, match="vocabulary cannot write an answer of this form"):
        tokens.start(Grammar(("zebra",))).mask(zeros)


class Says:
    """A language model that would rather say these words, in order; see `Decoding`."""

    context_length = 100

    def __init__(self, size: int, *ids: int) -> None:
        self.position, self._size, self._ids = 0, size, ids

    def decode(self, token: int) -> Logits:
        self.position += 1
        return self.logits()

    def logits(self) -> Logits:
        logits = np.zeros(self._size, np.float32)
        logits[self._ids[min(self.position, len(self._ids) - 1)]] = 1
        return logits


def test_a_dead_end_is_no_complete_answer() -> None:
    """The vocabulary has no quote, so `a"b` cannot be written after `a`."""
    words = ["</s>", "<unk>", "a", "yes"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    grammar = Grammar(('a"b', "yes"))
    ends = {}
    for liked in (2, 3):
        model = Says(len(words) + 4, liked, 1)  # more rows than tokens, as many models have
        generation = Generation(
            model,
            model.logits(),
            tokenizer,
            stop_token_ids=(0,),
            options=GenerationOptions(grammar=grammar),
            constraint=GrammarTokens(tokenizer, [0]).start(grammar),
        )
        text = "".join(generation)
        ends[text] = generation.finish
    assert ends == {"a": "broken_form", "yes": "complete"}


def test_thousands_of_choices(model: Model) -> None:
    choices = tuple(f"choice {at} of {at * 7}" for at in range(5000))
    for seed in range(3):
        given = answer(model, Grammar(choices), seed, temperature=3.0)
        assert given.finish == "complete"
        assert given.text in choices


def test_json_has_few_blanks(model: Model) -> None:
    """Blanks without end were an answer that never came."""
    grammar = Grammar(json_schema='{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}')
    for seed in range(5):
        given = answer(model, grammar, seed, temperature=3.0)
        assert given.finish == "complete"
        assert "  " not in given.text and "\n" not in given.text


@pytest.mark.parametrize("schema", ["not json", '{"type": "nonsense"}'])
def test_a_schema_that_is_none(model: Model, schema: str) -> None:
    with pytest.raises(OptionError, match="form of the answer cannot be used"):
        answer(model, Grammar(json_schema=schema))


def options_from(**typed: Any) -> GenerationOptions:
    """What a command makes of options as they are typed."""
    made: list[GenerationOptions] = []

    def main(generation: GenerationOptions) -> None:
        made.append(generation)

    spread(main)(**typed)
    return made[0]


def test_options(tmp_path: Path) -> None:
    assert options_from() == GenerationOptions()
    assert options_from(choices="yes,no").grammar == Grammar(("yes", "no"))
    file = tmp_path / "schema.json"
    file.write_text("{}")
    chosen = options_from(json_schema=file, stop=["."], top_k=3)
    assert chosen.grammar == Grammar(json_schema="{}")
    assert (chosen.stop, chosen.sampling.top_k) == ((".",), 3)
    with pytest.raises(OptionError, match="both given"):
        options_from(choices="yes", json_schema=file)
    with pytest.raises(OptionError, match="cannot be read"):
        options_from(json_schema=tmp_path / "none.json")
    with pytest.raises(OptionError, match="have an empty one among them"):
        options_from(choices="yes,,no")
    with pytest.raises(OptionError, match="one of the two"):
        Grammar()
    with pytest.raises(OptionError, match="not Unicode text"):
        Grammar(("yes", "\udcff"))
    with pytest.raises(OptionError, match="expected at most 1048576"):
        Grammar(("x" * 600_000, "y" * 600_000))


def test_without_llguidance(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return load(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r'pip install "foveate\[constrained\]"'):
        GrammarTokens(model.writer.tokenizer, [2])
