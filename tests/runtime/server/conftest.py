"""Servers of the bundled checkpoint and of a tiny one, on real sockets."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from engines.bundle import Bundle, open_bundle
from runtime.commands.serve import start
from runtime.server.options import Limits, Listening, ServedParts
from runtime.server.service import Service

POCKET = Path(__file__).parents[3] / "models" / "pocket-llava"
BUDGETS = (64, 16, 576)


@dataclass
class Served:
    """A server that runs in a thread of the test.

    Attributes:
        url: where.
        service: what it serves.
        thread: its event loop's.
    """

    url: str
    service: Service
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client; it repeats nothing unless it is told to."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)


@contextmanager
def serving(bundle: Path, **options: Any) -> Iterator[Served]:
    """Serve a bundle; options are those of the three groups."""
    groups = []
    for kind in (ServedParts, Listening, Limits):
        names = kind.__dataclass_fields__
        groups.append(kind(**{name: options.pop(name) for name in list(options) if name in names}))
    assert not options
    server, service, listener, url = start(bundle, *groups)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        yield Served(url, service, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()
        listener.close()


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundled checkpoint with graphs of 16, 64 and all tokens."""
    if not (POCKET / "model.safetensors").is_file():
        pytest.skip("models/pocket-llava is not here")
    from export.build import build_bundle
    from export.build.plan import BuildOptions

    out = tmp_path_factory.mktemp("served") / "pocket"
    build_bundle(BuildOptions(str(POCKET), out, reducer="visionzip", tokens=(64, 16, "all")))
    return open_bundle(out)


@pytest.fixture(scope="session")
def server(pocket: Bundle) -> Iterator[Served]:
    with serving(pocket.root, port=0, threads=1) as served:
        yield served


@pytest.fixture(scope="session")
def talker(language_bundle: Bundle) -> Iterator[Served]:
    """A tiny model of random weights, whose vocabulary can write any text: answers never end."""
    with serving(language_bundle.root, port=0, threads=1, parallel=2, max_tokens=400) as served:
        yield served


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


def questions() -> list[tuple[Path, str, str]]:
    """Picture, question and answer of the held-out set."""
    lines = (POCKET / "test" / "questions.jsonl").read_text("utf-8").splitlines()
    told = map(json.loads, lines)
    return [(POCKET / "test" / one["image"], one["question"], one["answer"]) for one in told]


def data_uri(file: Path | bytes, kind: str = "image/png") -> str:
    data = file if isinstance(file, bytes) else file.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asking(text: str, *files: Path | bytes) -> list[dict[str, Any]]:
    """Messages that ask about pictures."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(file)}} for file in files]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *shown]}]
