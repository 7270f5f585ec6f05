"""An answer that is called complete has its form, whatever the form and whatever the model says."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.errors import FoveateError, OptionError
from runtime.language.answer_form import problem_with_form, require_usable
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.grammar import Grammar, GrammarTokens
from runtime.language.parts import Logits
from runtime.language.sampling import Sampler, Sampling
from tests.faults.scale import cases
from tests.faults.time_limit import time_limit
from tests.tiny_language import tiny_tokenizer

pytest.importorskip("llguidance", reason="llguidance: the extra `constrained`")
LIMIT_S = 30.0
WORDS = ("</s>", "<unk>", "a", "b", "yes", "no", "left", "of", "1", "2", "{", "}", "[", "]", "true")
SEED = st.integers(0, 2**32 - 1)


def tried(count: int) -> settings:
    """Try so many examples, the same ones every time."""
    return settings(
        max_examples=cases(count),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class RandomModel:
    """A language model that says anything; see `Decoding`."""

    def __init__(self, vocabulary: int, seed: int, context_length: int = 60) -> None:
        self.context_length, self.position = context_length, 0
        self._vocabulary, self._random = vocabulary, np.random.default_rng(seed)

    def logits(self) -> Logits:
        return self._random.normal(size=self._vocabulary, scale=3).astype(np.float32)

    def decode(self, token: int) -> Logits:
        self.position += 1
        return self.logits()


def _bytes() -> tuple[Tokenizer, GrammarTokens]:
    tokenizer = tiny_tokenizer().backend_tokenizer
    return tokenizer, GrammarTokens(tokenizer, [2])


def _words() -> tuple[Tokenizer, GrammarTokens]:
    """As the bundled checkpoint's: most forms cannot be written with it."""
    model = models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    return tokenizer, GrammarTokens(tokenizer, [0])


TOKENIZERS = (_bytes(), _words())


def answer(form: Grammar, seed: int, kind: int, stop: tuple[str, ...] = ()) -> Generation | None:
    """Let a random model answer; None where the form is refused."""
    tokenizer, tokens = TOKENIZERS[kind]
    model = RandomModel(
        tokenizer.get_vocab_size() + 3, seed
    )  # a few rows more than tokens, as real
    options = GenerationOptions(40, stop, Sampling(1.0, seed=seed), form)
    with time_limit(LIMIT_S):
        try:
            require_usable(form)
            constraint = tokens.start(form)
        except OptionError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return None
        stops = [2] if kind == 0 else [0]
        generation = Generation(
            model,
            model.logits(),
            tokenizer,
            stop_token_ids=stops,
            options=options,
            constraint=constraint,
        )
        assert "".join(generation) == generation.text
    return generation


CHOICES = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8)


@tried(500)
@given(choices=CHOICES, seed=SEED, kind=st.integers(0, 1), stop=st.sampled_from(((), ("a",))))
def test_choices(choices: list[str], seed: int, kind: int, stop: tuple[str, ...]) -> None:
    stripped = [choice.strip() for choice in choices]
    try:
        form = Grammar(tuple(choices))
    except OptionError:
        assert not all(stripped)
        return
    given_answer = answer(form, seed, kind, stop)
    if given_answer is not None and given_answer.finish == "complete":
        assert given_answer.text in stripped


@pytest.mark.parametrize(
    "choices",
    [
        tuple(f"choice {at} of {at * 7}" for at in range(5000)),
        ('a"b', "yes"),
        ("a|b", "(c", "[", ".*", "\\d", "x{3}", "^$"),
        ("yes", "yes please", "yes, please"),
        ("</s>", "<unk>x", "<image>"),
        ("\u2028x", "😀", "a\nb", "e\u0301", "\ufeffx"),
        ("/* x */", "// y", "%json {}", 'start: "z"'),
    ],
    ids=lambda choices: choices[0][:8],
)
@pytest.mark.parametrize("kind", [0, 1], ids=["bytes", "words"])
def test_choices_that_once_broke(choices: tuple[str, ...], kind: int) -> None:
    form = Grammar(choices)
    for seed in range(4):
        given_answer = answer(form, seed, kind)
        if given_answer is not None and given_answer.finish == "complete":
            assert given_answer.text in form.choices
        if kind == 0:
            assert given_answer is not None and given_answer.finish in ("complete", "max_tokens")


def schemas() -> st.SearchStrategy[Any]:
    """Schemas that a robot's programmer would write."""
    simple = st.one_of(
        st.builds(
            lambda low, wide: {"type": "integer", "minimum": low, "maximum": low + wide},
            st.integers(-100, 100),
            st.integers(0, 300),
        ),
        st.just({"type": "boolean"}),
        st.just({"type": "integer"}),
        st.just({"type": "null"}),
        st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 9)),
        st.builds(lambda those: {"enum": those}, st.lists(st.text(max_size=5), min_size=1)),
    )

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        fields = st.dictionaries(st.text(max_size=4), inner, max_size=3)
        return st.one_of(
            fields.map(
                lambda properties: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(properties),
                    "additionalProperties": False,
                }
            ),
            st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        )

    return st.recursive(simple, larger, max_leaves=4)


def conforms(document: Any, schema: dict[str, Any]) -> bool:
    """What the schemas above mean, in other words than the library under test."""
    if "enum" in schema:
        return document in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(document, dict)
            and document.keys() == properties.keys()
            and all(conforms(value, properties[name]) for name, value in document.items())
        )
    if kind == "array":
        items = schema["items"]
        return (
            isinstance(document, list)
            and len(document) <= schema["maxItems"]
            and all(conforms(value, items) for value in document)
        )
    if kind == "string":
        return isinstance(document, str) and len(document) <= schema["maxLength"]
    if kind == "integer":
        low, high = schema.get("minimum", document), schema.get("maximum", document)
        return type(document) is int and low <= document <= high
    return document is None if kind == "null" else isinstance(document, bool)


@tried(500)
@given(schema=schemas(), seed=SEED, kind=st.integers(0, 1))
def test_schemas(schema: dict[str, Any], seed: int, kind: int) -> None:
    given_answer = answer(Grammar(json_schema=json.dumps(schema)), seed, kind)
    if given_answer is not None and given_answer.finish == "complete":
        assert conforms(json.loads(given_answer.text), schema)


HOSTILE = (
    None, -1, 0, 1e308, 10**40, "", "x", "(", "^(a+)+$", "a{99999}{99999}", "\\", [], {}, [None],
    {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"},
    {"$ref": "#/$defs/none"}, {"allOf": [{"$ref": "#"}]}, {"not": {"$ref": "#"}}, True, False,
    {"pattern": "^(a|a)*$"}, {"enum": []}, {"const": "\x00"}, {"anyOf": []}, {"multipleOf": 0},
)  # fmt: skip
KEYWORDS = (
    "type", "properties", "required", "items", "enum", "const", "pattern", "format", "$ref",
    "anyOf", "allOf", "oneOf", "not", "minimum", "maximum", "minLength", "maxLength", "multipleOf",
    "$schema", "$defs", "if", "then", "uniqueItems", "prefixItems", "additionalProperties", "$id",
    "x-guidance",
)  # fmt: skip
NASTY: tuple[dict[str, Any], ...] = (
    *({"type": "string", "pattern": pattern} for pattern in (
        "^(a+)+$", "^(a|a)*$", "(a{500}){500}", "a{100000}", "(?=x)y", "(a)\\1", "\\p{L}+",
        "[^\\W]", "(x+x+)+y", "\\u0000", "^$", "a^", "((((((((((a*)*)*)*)*)*)*)*)*)*)*",
    )),
    *({"type": "string", "format": name} for name in ("date-time", "uuid", "regex", "ipv6", "x")),
    {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**7},
    {"type": "array", "items": {"$ref": "#"}}, {"type": "array", "uniqueItems": True},
    {"type": "number", "multipleOf": 1e-300}, {"type": "integer", "multipleOf": 7919},
    {"type": "integer", "minimum": 10**30}, {"type": "number", "exclusiveMinimum": 1e308},
    {"enum": list(range(3000))}, {"const": {"a": [1.0, None]}}, {"minProperties": 10**6},
    {"anyOf": [{"const": at} for at in range(300)]}, {"oneOf": [{"type": "integer"}] * 50},
    {"properties": {f"k{at}": {"type": "null"} for at in range(500)}}, {"type": ["null", "string"]},
    {"$defs": {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(9)}
     | {"d9": {"type": "integer"}}, "$ref": "#/$defs/d0"},
    {"type": "object", "patternProperties": {"^(a+)+$": {"$ref": "#"}}}, {"$ref": "#/properties/a"},
)  # fmt: skip
TEXTS = (
    "",
    "{",
    "null",
    "1",
    '"a"',
    "[]",
    "{}",
    '{"a": 1}',
    "NaN",
    "[" * 300,
    "1" * 5000,
    "a" * 50,
)


def hostile_schema(number: int) -> str:
    """A schema that no programmer would write, from a number."""
    random_ = random.Random(number)
    good = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema: Any = good if random_.random() < 0.5 else {}
    if random_.random() < 0.6:
        good["properties"] = {"a": random_.choice(NASTY), "b": random_.choice(NASTY)}
        return json.dumps(random_.choice((good, random_.choice(NASTY))))
    for _ in range(random_.randint(1, 3)):
        holder = schema["properties"]["a"] if schema is good and random_.random() < 0.3 else schema
        if isinstance(holder, dict):
            value = random_.choice(HOSTILE)
            wrapped = {random_.choice(KEYWORDS): value} if random_.random() < 0.4 else value
            holder[random_.choice(KEYWORDS[1:])] = wrapped
            schema["properties"] = {"a": {}} if schema is good else schema.get("properties", {})
    text = json.dumps(schema)
    if random_.random() < 0.2:
        at = random_.randrange(len(text))
        text = text[:at] + random_.choice(('"', "{", "\\", "\x00", "NaN", "")) + text[at + 1 :]
    if random_.random() < 0.05:
        text = '{"items":' * 2000 + text + "}" * 2000
    return text


def test_hostile_schemas() -> None:
    used = 0
    for number in range(cases(500)):
        form = Grammar(json_schema=hostile_schema(number))
        with time_limit(LIMIT_S):
            try:
                require_usable(form)
            except OptionError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                continue
            used += answer(form, number, number % 2) is not None
            for text in TEXTS:
                problem = problem_with_form(text, form)
                assert problem is None or len(problem) < 400
    assert used


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@tried(300)
@given(
    logits=st.lists(NUMBERS, min_size=2, max_size=20),
    temperature=st.floats(0, 1e300),
    penalty=st.floats(0, 1e300),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 10**20),
    seed=SEED,
)
def test_any_setting_chooses_a_token(
    logits: list[float], temperature: float, penalty: float, top_p: float, top_k: int, seed: int
) -> None:
    try:
        sampling = Sampling(temperature, top_k, top_p, penalty, seed)
    except FoveateError:
        return
    row = np.array([*logits, -np.inf], np.float32)
    sampler = Sampler(sampling, [0])
    for _ in range(3):
        assert 0 <= sampler.choose(row) < len(logits)
