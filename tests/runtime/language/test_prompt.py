"""Prompts: ids equal to transformers', control tokens defused, templates of every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaProcessor

from engines.bundle import Bundle
from engines.errors import BundleError, OptionError
from runtime.language.prompt import PromptWriter, Turn

IMAGE = 4
QUESTION = Turn("user", "What is in the picture?", images=1)
CONVERSATIONS = [
    [QUESTION],
    [Turn("user", "How many chairs are there?")],
    [Turn("system", "Be brief."), QUESTION],
    [QUESTION, Turn("assistant", "A red cup."), Turn("user", "And now?\nTell me: 日本", images=2)],
]
STRING_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def writer(language_bundle: Bundle) -> PromptWriter:
    return PromptWriter(language_bundle)


@pytest.fixture(scope="module")
def processor(language_checkpoint: Path) -> LlavaProcessor:
    loaded: Any = AutoProcessor.from_pretrained(language_checkpoint)
    return loaded


def with_template(bundle: Bundle, template: str, **changes: object) -> Bundle:
    prompt = bundle.manifest.prompt.model_copy(update={"chat_template": template, **changes})
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"prompt": prompt}))


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.text}],
        }
        for turn in turns
    ]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("answer", [True, False])
def test_ids_equal_transformers(
    writer: PromptWriter, processor: LlavaProcessor, turns: list[Turn], answer: bool
) -> None:
    text = processor.apply_chat_template(messages_of(turns), add_generation_prompt=answer)
    assert writer.render(turns, answer) == text
    expected = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert writer.ids(turns, answer).tolist() == expected
    assert expected.count(IMAGE) == sum(turn.images for turn in turns)


def test_ids_equal_transformers_with_a_picture(
    writer: PromptWriter, processor: LlavaProcessor
) -> None:
    messages = messages_of([QUESTION])
    messages[0]["content"][0]["image"] = np.zeros((28, 28, 3), np.uint8)
    expanded = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    ids = np.array(expanded)
    first = int(np.flatnonzero(ids == IMAGE)[0])
    collapsed = np.concatenate([ids[:first], [IMAGE], ids[ids.tolist().count(IMAGE) + first :]])
    assert np.array_equal(writer.ids([QUESTION]), collapsed)


@pytest.mark.parametrize("in_template", [True, False])
def test_bos_is_there_once(language_bundle: Bundle, tmp_path: Path, in_template: bool) -> None:
    """A tokenizer that adds it and a template that has it already must not add up."""
    source = language_bundle.root / language_bundle.manifest.prompt.tokenizer
    tokenizer = Tokenizer.from_file(str(source))
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    target = tmp_path / language_bundle.manifest.prompt.tokenizer
    target.parent.mkdir(parents=True)
    tokenizer.save(str(target))
    template = ("{{ bos_token }}" if in_template else "") + STRING_TEMPLATE
    writer = PromptWriter(replace(with_template(language_bundle, template), root=tmp_path))
    ids = writer.ids([QUESTION]).tolist()
    assert ids[0] == 1
    assert ids.count(1) == 1


def test_templates_that_take_strings(language_bundle: Bundle) -> None:
    writer = PromptWriter(with_template(language_bundle, STRING_TEMPLATE))
    assert writer.render([QUESTION]) == "user: <image>\nWhat is in the picture?\nassistant:"


def test_control_tokens_that_a_person_wrote_are_plain_text(writer: PromptWriter) -> None:
    rude = Turn("user", "Read </s> and <image> and <s> to me", images=1)
    ids = writer.ids([rude]).tolist()
    assert (ids.count(1), ids.count(2), ids.count(IMAGE)) == (1, 0, 1)
    assert writer.tokenizer.decode(ids) == writer.tokenizer.decode(
        writer.tokenizer.encode(writer.render([replace(rude, text="@")])).ids
    ).replace("@", rude.text)
    assert rude.text in writer.render([rude])


def test_parts_put_visual_tokens_where_the_pictures_are(writer: PromptWriter) -> None:
    turns = CONVERSATIONS[3]
    pictures = [np.full((n, 4), n, np.float32) for n in (2, 3, 5)]
    parts = writer.parts(turns, pictures)
    assert [part.ndim for part in parts] == [1, 2, 1, 2, 1, 2, 1]
    assert [len(part) for part in parts[1::2]] == [2, 3, 5]
    ids = np.concatenate([parts[0], [IMAGE], parts[2], [IMAGE], parts[4], [IMAGE], parts[6]])
    assert np.array_equal(ids, writer.ids(turns))
    with pytest.raises(OptionError, match="places for 3 pictures, and 2 were given"):
        writer.parts(turns, pictures[:2])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {{ m['content'] }}\n{% endfor %}\n  x",
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | tojson }}{% if true %}{% break %}{% endif %}"
        "{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}<image>",
    ],
    ids=["blocks trimmed", "generation", "tojson and break", "namespace"],
)
def test_templates_render_as_in_transformers(
    language_bundle: Bundle, processor: LlavaProcessor, template: str
) -> None:
    writer = PromptWriter(with_template(language_bundle, template))
    turn = Turn("user", "<b>what & why</b>", images=1)
    messages = [{"role": "user", "content": f"<image>\n{turn.text}"}]
    expected = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert writer.render([turn]) == expected


def test_strftime_now_is_there(language_bundle: Bundle) -> None:
    writer = PromptWriter(with_template(language_bundle, "{{ strftime_now('%Y') }} <image>"))
    assert writer.render([QUESTION])[:2] == "20"


def test_a_template_that_refuses(language_bundle: Bundle) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    writer = PromptWriter(with_template(language_bundle, template))
    with pytest.raises(OptionError, match="refuses this conversation: no system"):
        writer.ids([Turn("system", "x")])


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__ }}"]
)
def test_a_template_is_kept_in_its_sandbox(language_bundle: Bundle, template: str) -> None:
    writer = PromptWriter(with_template(language_bundle, template + "<image>"))
    try:
        shown = writer.render([QUESTION])
    except OptionError:
        return
    assert "class" not in shown and "function" not in shown


def test_a_picture_the_template_loses_is_noticed(language_bundle: Bundle) -> None:
    writer = PromptWriter(with_template(language_bundle, "{{ messages[0]['role'] }}"))
    with pytest.raises(OptionError, match="has 1 pictures and its prompt has 0 places"):
        writer.ids([QUESTION])


def test_a_template_that_is_not_jinja(language_bundle: Bundle) -> None:
    writer = PromptWriter(with_template(language_bundle, "{% for %}"))
    with pytest.raises(BundleError, match="chat template is not valid Jinja"):
        writer.ids([QUESTION])


def test_an_image_token_the_tokenizer_does_not_know(language_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"said to have id 9, and llm/tokenizer.json gives it 4"):
        PromptWriter(with_template(language_bundle, "", image_token_id=9))


def test_a_damaged_tokenizer(language_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        PromptWriter(replace(language_bundle, root=tmp_path))
