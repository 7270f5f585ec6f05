"""Write visual tokens in the file format of `torch.save`, which a vLLM server reads.

The result is base64 text of a float16 tensor. The format is a zip archive with a short pickle that
names the shape, and a file with the numbers. NumPy and the standard library write both, so a robot
needs no PyTorch.
"""

from __future__ import annotations

import base64
import io
import pickle
import zipfile

import numpy as np

from engines.errors import BackendError
from runtime.language.parts import Embeddings, Picture, PlacedTokens


def payload_from_picture(picture: Picture, hidden_size: int) -> str:
    """Return what `payload_from_rows` does, of a picture whose tokens are plain.

    Raises:
        BackendError: they have, or as there.
    """
    if isinstance(picture, PlacedTokens):
        raise BackendError(
            "A picture's tokens have places or weights of their own, and a server numbers them "
            "itself, one after the other. Open the model without positions and visual_weights."
        )
    return payload_from_rows(picture, hidden_size)


def payload_from_rows(rows: Embeddings, hidden_size: int) -> str:
    """Return visual tokens as base64 of a float16 tensor in the format of `torch.save`.

    Args:
        rows: float32[N, D].
        hidden_size: D that the language model takes.

    Raises:
        BackendError: a shape or dtype that is none of ours, or a number that float16 cannot hold.
            NaN and infinity would stay in the server's prefix cache and spoil the answers of
            everyone who asks it afterwards.
    """
    if rows.ndim != 2 or rows.dtype != np.float32 or not len(rows):
        raise BackendError(
            f"The visual tokens are {rows.dtype}{list(rows.shape)}: expected "
            f"float32[N, {hidden_size}] with N at least 1."
        )
    if rows.shape[1] != hidden_size:
        raise BackendError(
            f"The visual tokens are {rows.shape[1]} wide, and the language model takes "
            f"{hidden_size}. The vision graph belongs to another model; build the bundle again."
        )
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(rows, "<f2")
    if not np.isfinite(half).all():
        raise BackendError(
            "The visual tokens hold NaN, infinity or numbers beyond 65504, float16's largest, and "
            "were not sent: a server would keep them and spoil the answers of others. The vision "
            "graph overflowed: build it with --precision fp32."
        )
    return base64.b64encode(_archive(half.tobytes(), *half.shape)).decode("ascii")


def _archive(numbers: bytes, rows: int, columns: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("tensor/data.pkl", _describe(rows, columns))
        archive.writestr("tensor/byteorder", "little")
        archive.writestr("tensor/data/0", numbers)
        archive.writestr("tensor/version", "3\n")
    return file.getvalue()


def _describe(rows: int, columns: int) -> bytes:
    """Return the pickle of a tensor [rows, columns] whose numbers are in `data/0`.

    It says _rebuild_tensor_v2(storage, 0, (rows, columns), (columns, 1), False, OrderedDict()).
    """
    storage = (
        pickle.MARK
        + _text("storage")
        + _named("torch", "HalfStorage")
        + _text("0")
        + _text("cpu")
        + _number(rows * columns)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    arguments = (
        pickle.MARK
        + storage
        + _number(0)
        + _number(rows)
        + _number(columns)
        + pickle.TUPLE2
        + _number(columns)
        + _number(1)
        + pickle.TUPLE2
        + pickle.NEWFALSE
        + _named("collections", "OrderedDict")
        + pickle.EMPTY_TUPLE
        + pickle.REDUCE
        + pickle.TUPLE
    )
    rebuild = _named("torch._utils", "_rebuild_tensor_v2")
    return pickle.PROTO + b"\x02" + rebuild + arguments + pickle.REDUCE + pickle.STOP


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode()


def _number(value: int) -> bytes:
    return pickle.BININT + value.to_bytes(4, "little", signed=True)
