"""Save a conversation to a JSON file, and continue it later.

The file holds the words and the visual tokens, with their places if they have some. The pictures
themselves are not kept, and the KV cache is computed again with the next question.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.staging import staged_file
from runtime.conversation import Conversation, Exchange, ShownImage
from runtime.language.parts import Embeddings, Picture, PlacedTokens
from runtime.model import Model

_FORMAT = 1


def save_conversation(conversation: Conversation, path: str | Path) -> None:
    """Write a conversation whole or not at all; what was shown and not asked about is left out.

    Raises:
        OptionError: the file cannot be written.
    """
    document = {
        "foveate_conversation": _FORMAT,
        "model": conversation.model.bundle.manifest.model,
        "language_model": _identity(conversation.model.bundle),
        "system": conversation.system,
        "exchanges": [
            {
                "question": exchange.question,
                "answer": exchange.answer,
                "pictures": [
                    {"name": image.name, **_fields_from_picture(image.tokens)}
                    for image in exchange.images
                ],
            }
            for exchange in conversation.exchanges
        ],
    }
    with staged_file(Path(path), OptionError) as staged:
        staged.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")


def restore_conversation(model: Model, path: str | Path) -> Conversation:
    """Take up a conversation that was saved.

    Raises:
        OptionError: not a saved conversation, or one with another language model.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        known = document["foveate_conversation"] == _FORMAT
        conversation = Conversation(model, document["system"])
        exchanges = [_exchange(fields, model) for fields in document["exchanges"]]
        same = document["language_model"] == _identity(model.bundle)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path} is not a saved conversation ({type(error).__name__}: {error}). Give a file "
            "that /save wrote."
        ) from error
    if not known or not same:
        raise OptionError(
            f"{path} is a conversation with {document.get('model')!r}, and its visual tokens mean "
            f"nothing to {model.bundle.manifest.model!r}, whose embedding table is another. Open "
            "the bundle it was held with."
        )
    conversation.exchanges = exchanges
    return conversation


def _identity(bundle: Bundle) -> str:
    """Return what tells one language model's embedding space from another's."""
    return bundle.manifest.files[bundle.manifest.text.embeddings].sha256


def _exchange(fields: dict[str, Any], model: Model) -> Exchange:
    width = model.bundle.manifest.text.hidden_size
    images = tuple(
        ShownImage(str(image["name"]), _picture_from_fields(image, width, model))
        for image in fields["pictures"]
    )
    return Exchange(str(fields["question"]), images, fields["answer"])


def _fields_from_picture(picture: Picture) -> dict[str, Any]:
    if not isinstance(picture, PlacedTokens):
        return {"tokens": _text_from_tokens(picture)}
    placed = {"places": picture.places.tolist(), "length": picture.length}
    placed["bias"] = picture.bias.tolist()
    return {"tokens": _text_from_tokens(picture.tokens), **placed}


def _picture_from_fields(fields: dict[str, Any], width: int, model: Model) -> Picture:
    """Read a picture as it was shown; a model that takes plain tokens only gets those."""
    tokens = _tokens_from_text(fields["tokens"], width)
    plain = model.positions == "compact" and model.visual_weights == "equal"
    if plain or "places" not in fields:
        return tokens
    places, length = np.array(fields["places"], np.int64), int(fields["length"])
    if places.shape != (len(tokens),) or not 0 <= places.min() <= places.max() < length:
        raise ValueError(f"the places of a picture of {len(tokens)} tokens are {places.tolist()}")
    bias = np.array(fields["bias"], np.float32)
    if bias.shape != places.shape:
        raise ValueError(f"{len(bias)} of a picture's {len(tokens)} tokens have a bias")
    return PlacedTokens(tokens, places, length, bias)


def _text_from_tokens(tokens: Embeddings) -> str:
    return b64encode(tokens.astype("<f4").tobytes()).decode("ascii")


def _tokens_from_text(text: str, width: int) -> Embeddings:
    flat = np.frombuffer(b64decode(text, validate=True), "<f4")
    return flat.reshape(-1, width).astype(np.float32)  # [N, D]
