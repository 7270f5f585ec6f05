"""The tokenizer: a word list, lower-cased, with punctuation apart.

Nothing enters; a fast tokenizer with a LLaVA-1.5-like chat template leaves. "What color is the
ball?" becomes `what color is the ball ?`, and decoding closes the gap before punctuation again.
"""

from __future__ import annotations

from layout import COLORS, SHAPES
from questions import NUMBERS, PLURALS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN, IMAGE, VIDEO = "<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>"
SYSTEM_PROMPT = "You are a robot. Answer the question about the image."
VOCABULARY_SIZE = 128  # a multiple of 32, so that the output layer quantizes in blocks

_WORDS = (
    "user assistant : ? . , what color is the shape object objects how many are there do you see "
    "a where of nearest path ahead clear from to list robot answer question about image "
    "yes no nothing left center right"
)
# What pocket-onevision is asked besides; pocket-llava's tokenizer has reserved places here.
_MORE_WORDS = (
    "sign signs with on have stripes bars checks dots moved entered happened first in this clip"
)

# The template joins turns as LLaVA-1.5 does. The image's position in a message is kept.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %} "
    "{% else %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_VIDEO_PART = "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
VIDEO_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ '<image>\n' }}{% else %}", "{{ '<image>\n' }}" + _VIDEO_PART + "{% else %}"
)


def list_words() -> list[str]:
    """Return the vocabulary in id order, padded with `<reserved N>` to `VOCABULARY_SIZE`."""
    words = [PAD, BOS, EOS, UNKNOWN, IMAGE, *_WORDS.split()]
    words += [*NUMBERS, *COLORS, *SHAPES, *PLURALS, *_MORE_WORDS.split(), VIDEO]
    reserved = [f"<reserved {number}>" for number in range(VOCABULARY_SIZE - len(words))]
    return words + reserved


def build_tokenizer(with_video: bool = False) -> PreTrainedTokenizerFast:
    """Build the tokenizer that is saved with the checkpoint.

    Args:
        with_video: take `<video>` as a placeholder for a clip, also in the chat template.
    """
    special = {"image_token": IMAGE} | ({"video_token": VIDEO} if with_video else {})
    ids = {word: number for number, word in enumerate(list_words())}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\bcolour\b"), "color"),
            normalizers.Replace(Regex(r"\bcentre\b"), "center"),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # words apart from punctuation
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces, none before , . ?
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=special,
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=True,
        chat_template=VIDEO_CHAT_TEMPLATE if with_video else CHAT_TEMPLATE,
    )
