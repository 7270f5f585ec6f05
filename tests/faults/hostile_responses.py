"""Responses of a chat server that is broken or means harm, each made from a number.

The same number makes the same response. Every third is a good answer with something in its JSON
replaced, every third one with its bytes damaged, and the rest are HTTP that no server should speak
and streams that do not end.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

from tests.faults.hostile_server import Response

KEY = "sk-hush-4711"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
ANSWERS = ("yes", "no", "banana", '{"n": 1}', '{"n": "x"}', "", "{", "[1]", '{"n": 12', "yes\n")
VALUES: tuple[Any, ...] = (
    None, -1, 0, True, 2**31, 2**63, 10**30, 0.5, -1e308, "", "x", "\x00\x1b[2J", "\u2028", [], {},
    [None], [-1], [[]], {"": None}, ["x"] * 500, "y" * 70000, [10] * 300, {"content": 5}, KEY,
    [{"index": 0, "delta": {"content": "a"}}] * 3,
)  # fmt: skip
RAW = (
    '"\\ud800"', "NaN", "Infinity", "1e999", "1" * 5000, "[" * 5000, '{"a":' * 3000, "'x'", "",
    '"\\u0000"', "-", "tru", '"unfinished', "{}{}", "\ufeff{}",
)  # fmt: skip


def event(text: str, ids: list[int] | None = None, **ending: object) -> dict[str, Any]:
    """One event as vLLM sends it."""
    choice = {"index": 0, "delta": {"content": text}, "token_ids": ids, "finish_reason": None}
    return {"choices": [choice | ending]}


def good_answer(random_: random.Random) -> list[dict[str, Any]]:
    """The events of an answer in order; what it says may still break its form."""
    text = random_.choice(ANSWERS)
    cut = random_.randint(0, len(text))
    finish = random_.choice(("stop", "stop", "length"))
    usage = {"prompt_tokens": 31, "prompt_tokens_details": {"cached_tokens": 16}}
    return [
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
        event(text[:cut], [10]),
        event(text[cut:], [11]),
        event("", [2], finish_reason=finish, stop_reason=None),
        {"choices": [], "usage": usage},
    ]


def stream(events: list[Any]) -> bytes:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in events]
    return b"".join(b"data: " + line.encode() + b"\n\n" for line in [*lines, "[DONE]"])


def response(number: int) -> Response:
    """Return the response of a number."""
    random_ = random.Random(number)
    kind = (_replaced, _damaged, _other)[number % 3]
    return kind(random_)


def models(number: int) -> Response:
    """Return a list of models that is none, or one that should not be believed."""
    random_ = random.Random(number)
    listed: Any = {"data": [{"id": "tiny-llama", "max_model_len": 512}]}
    body = _dumped_with_a_surprise(listed, random_).encode()
    if random_.random() < 0.3:
        body = _scrambled(body, random_)
    return _sent(b"HTTP/1.1 200 OK\r\n\r\n" + body)


def _sent(*parts: bytes) -> Response:
    return lambda: iter(parts)


def _replaced(random_: random.Random) -> Response:
    events: list[Any] = good_answer(random_)
    for _ in range(random_.randint(1, 2)):
        at = random_.randrange(len(events))
        if isinstance(events[at], str):
            continue
        events[at] = _dumped_with_a_surprise(events[at], random_)
    if random_.random() < 0.2:
        events = events * random_.randint(2, 300)
    return _sent(HEAD + stream(events))


def _dumped_with_a_surprise(document: Any, random_: random.Random) -> str:
    """Return a document as JSON with a value in it, at any depth, replaced."""
    copy = json.loads(json.dumps(document))
    places = list(_places(copy))
    holder, key = random_.choice(places)
    if random_.random() < 0.6:
        holder[key] = random_.choice(VALUES)
        return json.dumps(copy)
    holder[key] = "@@"
    return json.dumps(copy).replace('"@@"', random_.choice(RAW))


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = document if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from _places(document[key])


def _damaged(random_: random.Random) -> Response:
    good = HEAD + stream(good_answer(random_))
    return _sent(_scrambled(good, random_))


def _scrambled(good: bytes, random_: random.Random) -> bytes:
    """Return bytes with a few of them changed, taken out, repeated or cut off."""
    data = bytearray(good)
    for _ in range(random_.randint(1, 6)):
        at = random_.randrange(len(data) + 1)
        end = min(len(data), at + random_.randint(1, 40))
        change = random_.randrange(5)
        if change == 0 and at < len(data):
            data[at] = random_.randrange(256)
        elif change == 1:
            del data[at:end]
        elif change == 2:
            data[at:at] = data[at:end] * random_.randint(1, 50)
        elif change == 3:
            data[at:at] = random_.randbytes(random_.randint(1, 30))
        elif random_.random() < 0.3:
            del data[at:]
    return bytes(data)


def _other(random_: random.Random) -> Response:
    kinds: list[Callable[[random.Random], Response]] = [_odd_http] * 12
    return random_.choice([*kinds, _endless, _too_much])(random_)


def _odd_http(random_: random.Random) -> Response:
    body = stream(good_answer(random_))
    status = random_.choice(
        ("200 OK", "204 No", "101 Switch", "301 Moved", "401 No", "404 No", "429 Wait", "500 Oh",
         "999 ?", "99999 x", "-1 x", "", "abc", "200")
    )  # fmt: skip
    version = random_.choice(
        ("HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "HTTP/", "ICY", "\x00", "GARBAGE")
    )
    header = random_.choice(
        (
            "Content-Length: -5", "Content-Length: 3", "Content-Length: 99999999999", "X: \x80\xff",
            "Content-Length: 1" + "0" * 5000, "Content-Length: x", "Transfer-Encoding: chunked",
            "Content-Encoding: gzip", "Location: http://127.0.0.1:1/", "Retry-After: nan",
            "Retry-After: inf", "Retry-After: -9", "Retry-After: 1e400", ": ", "no colon",
            "X: " + "y" * 70000, "\r\n".join(f"X{at}: y" for at in range(150)), "Set-Cookie: a=b",
        )
    )  # fmt: skip
    if "chunked" in header:
        size = random_.choice((f"{len(body):x}", "-5", "zz", "ffffffffffffffff", "0", "", "1;x=y"))
        body = f"{size}\r\n".encode() + body + random_.choice((b"\r\n0\r\n\r\n", b"", b"\r\n"))
    if random_.random() < 0.4:
        told = {"error": {"message": f"Incorrect API key provided: {KEY} \x1b[31m"}}
        body = random_.choice((json.dumps(told).encode(), b"[" * 9000, b'{"error": null}', b"\xff"))
    head = f"{version} {status}\r\n{header}\r\n\r\n".encode("latin-1")
    return _sent(head, body)


def _too_much(random_: random.Random) -> Response:
    """More than was asked for, but with an end."""
    events: list[Any] = [event("a", [10 + at % 200]) for at in range(500)]
    events += [event("", [2], finish_reason="stop")]
    if random_.random() < 0.5:
        events[1]["choices"][0]["token_ids"] = list(range(3, 200))
    return _sent(HEAD + stream(events))


def _endless(random_: random.Random) -> Response:
    """What never ends, at full speed or byte by byte."""
    start, again = random_.choice(
        (
            (HEAD, b": still here\n\n"),
            (HEAD, b"x"),
            (HEAD, b"\n"),
            (HEAD, b'data: {"choices": []}\n\n'),
            (HEAD + b"data: ", b"[1,"),
            (HEAD, stream([event("a", [10])])[:-16]),
            (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
            (b"HTTP/1.1 200 OK\r\nX: ", b"y"),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"x=y;"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\n: \r\n"),
            (b"HTTP/1.1 503 Busy\r\n\r\n", b"busy "),
            (b"", b""),
        )
    )
    if random_.random() < 0.5 and again:
        return lambda: chain([start], repeat(again * 500))
    return lambda: chain([start], _dripped(again))


def _dripped(again: bytes) -> Iterator[bytes]:
    while True:
        time.sleep(0.02)
        yield again or b""
