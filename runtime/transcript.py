"""Save a conversation to a JSON file, and continue it later.

The file holds the words and the visual tokens. The pictures themselves are not kept, and the KV
cache is computed again with the next question.
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
from runtime.language.parts import Embeddings
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
                    {"name": image.name, "tokens": _text_from_tokens(image.tokens)}
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
        ShownImage(str(image["name"]), _tokens_from_text(image["tokens"], width))
        for image in fields["pictures"]
    )
    return Exchange(str(fields["question"]), images, fields["answer"])


def _text_from_tokens(tokens: Embeddings) -> str:
    return b64encode(tokens.astype("<f4").tobytes()).decode("ascii")


def _tokens_from_text(text: str, width: int) -> Embeddings:
    flat = np.frombuffer(b64decode(text, validate=True), "<f4")
    return flat.reshape(-1, width).astype(np.float32)  # [N, D]
