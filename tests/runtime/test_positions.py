"""Positions and weights from the option to the logits: equal to transformers given the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle, open_bundle
from engines.errors import BackendError, OptionError
from export.build.plan import BuildOptions
from export.build.steps import build_bundle
from export.language.language_models import DecoderOptions
from runtime.backends.chat_server import ServerOptions
from runtime.backends.opening import open_text_backend
from runtime.backends.tensor_payload import payload_from_picture
from runtime.conversation import Conversation
from runtime.language.generate import GenerationOptions
from runtime.language.parts import PlacedTokens
from runtime.language.prompt import PromptWriter, Turn
from runtime.model import Model, open_model
from runtime.server.options import Limits, Listening, ServedParts
from runtime.server.service import Service
from runtime.transcript import restore_conversation, save_conversation
from tests.tiny_language import without_positions

SHORT = GenerationOptions(max_tokens=5)
PICTURES = [
    np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8) for seed in range(3)
]


@pytest.fixture(scope="module")
def bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """VisionZip leaves 6 of 16 patches: the class token, four patches and one that is merged."""
    out = tmp_path_factory.mktemp("positions") / "bundle"
    exact = DecoderOptions(precision="fp32")
    build_bundle(BuildOptions(str(language_checkpoint), out, tokens=(6,), decoders=exact))
    return open_bundle(out)


@pytest.fixture(
    scope="module",
    params=[
        ("ort", "original", "equal"),
        ("ort", "compact", "patches"),
        ("openvino", "original", "patches"),
    ],
    ids=" ".join,
)
def model(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Model]:
    backend, positions, weights = request.param
    pytest.importorskip("openvino" if backend == "openvino" else "onnxruntime")
    with open_model(
        bundle, backend=backend, threads=1, positions=positions, visual_weights=weights
    ) as opened:
        yield opened


def greedy(
    reference: LlavaForConditionalGeneration, model: Model, turns: list[Turn], most: int
) -> list[int]:
    """What transformers writes with the positions and the bias that these turns' prompt has."""
    ids = model.writer.ids(turns).tolist()
    embed, rows, positions, bias, following = reference.get_input_embeddings(), [], [], [], 0
    shown = iter(PICTURES)
    for token in ids:
        if token != model.writer.image_token_id:
            rows.append(embed(torch.tensor([token])))
            positions.append(following)
            bias.append(0.0)
            following += 1
            continue
        visual = model.encoder.encode([next(shown)])
        rows.append(torch.from_numpy(visual.tokens_of(0)))
        placed = model.picture_of(visual)
        assert isinstance(placed, PlacedTokens)
        positions += (following + placed.places).tolist()
        bias += placed.bias.tolist()
        following += placed.length
    assert any(bias) == (model.visual_weights == "patches")
    written: list[int] = []
    while len(written) < most:
        with torch.no_grad():
            given = torch.cat(rows)[None]
            at, later = torch.tensor([positions]), torch.ones(2 * [len(bias)]).triu(1).bool()
            mask = torch.tensor(bias).expand(1, 1, len(bias), -1).masked_fill(later, -torch.inf)
            logits = reference(inputs_embeds=given, position_ids=at, attention_mask=mask).logits
            token = int(logits[0, -1].argmax())
        if token == 2:
            break
        written.append(token)
        rows.append(embed(torch.tensor([token])))
        positions.append(following)
        bias.append(0.0)
        following += 1
    return written


def test_a_conversation_is_that_of_transformers(
    model: Model, language_reference: LlavaForConditionalGeneration
) -> None:
    """A picture, a follow-up question, and a second picture; the cache is used again."""
    conversation = Conversation(model)
    turns: list[Turn] = []
    for question, picture in (("What is it?", 0), ("How many?", None), ("And here?", 1)):
        if picture is not None:
            conversation.show(PICTURES[picture])
        answer = conversation.ask(question, SHORT)
        turns.append(Turn("user", question, images=0 if picture is None else 1))
        assert list(answer.token_ids) == greedy(language_reference, model, turns, 5), question
        assert bool(answer.reused_tokens) == (len(turns) > 1)
        turns.append(Turn("assistant", answer.text))
    conversation.replace_image(PICTURES[1])
    again = conversation.ask("And here?", SHORT)
    assert list(again.token_ids) == list(answer.token_ids)


def test_all_tokens_answer_the_same_in_both_modes(language_bundle: Bundle) -> None:
    texts = []
    for positions in ("compact", "original"):
        with open_model(language_bundle, threads=1, positions=positions) as opened:
            texts.append([opened.ask(one, "What is it?", SHORT).text for one in PICTURES])
    assert texts[0] == texts[1]


def test_a_saved_conversation_keeps_its_places(
    model: Model, bundle: Bundle, tmp_path: Path
) -> None:
    conversation = Conversation(model)
    conversation.show(PICTURES[0])
    conversation.ask("What is it?", SHORT)
    save_conversation(conversation, tmp_path / "talk.json")
    expected = conversation.ask("How many?", SHORT).text
    assert restore_conversation(model, tmp_path / "talk.json").ask("How many?", SHORT).text == (
        expected
    )
    with open_model(bundle, threads=1) as compact:
        (picture,) = restore_conversation(compact, tmp_path / "talk.json").images
        assert isinstance(picture.tokens, np.ndarray)


def test_the_oldest_go_when_the_trained_positions_are_used_up(model: Model) -> None:
    """A picture takes sixteen of them, and six places of the cache."""
    manifest = model.bundle.manifest
    text = manifest.text.model_copy(update={"context_length": 150})
    bundle = replace(model.bundle, manifest=manifest.model_copy(update={"text": text}))
    narrow = Model(bundle, model.encoder, model.writer, model.language, model.positions)
    left_out = 10 if model.positions == "original" else 0
    conversation = Conversation(narrow)
    for _ in range(6):
        conversation.show(PICTURES[0])
        answer = conversation.ask("Why?", SHORT)
        assert answer.prompt_tokens + left_out * len(conversation.images) + 5 <= 150
    assert conversation.dropped > 0


def test_who_cannot_take_positions_says_so(language_bundle: Bundle, tmp_path: Path) -> None:
    older = without_positions(language_bundle, tmp_path / "older")
    writer = PromptWriter(language_bundle)
    with pytest.raises(OptionError, match="--positions original: this bundle's ONNX decoder is of"):
        open_text_backend(writer, older, threads=1, positions="original")
    server = ServerOptions("http://127.0.0.1:1/v1")
    told = "--positions original: a server of the language model numbers"
    with pytest.raises(OptionError, match=told):
        open_text_backend(writer, language_bundle, server=server, positions="original")
    parts = ServedParts(llm_urls=("http://127.0.0.1:1/v1",), positions="original")
    with pytest.raises(OptionError, match=told):
        Service(language_bundle, parts, Listening(), Limits())
    with pytest.raises(OptionError, match="--visual-weights patches: this bundle's ONNX decoder"):
        open_text_backend(writer, older, threads=1, visual_weights="patches")
    with pytest.raises(OptionError, match="to a server of the language model all visual tokens"):
        open_text_backend(writer, language_bundle, server=server, visual_weights="patches")
    placed = PlacedTokens(np.ones((1, 64), np.float32), np.array([3]), 16, np.zeros(1, np.float32))
    with pytest.raises(BackendError, match="a server numbers them itself"):
        payload_from_picture(placed, 64)
