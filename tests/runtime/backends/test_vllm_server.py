"""A real vLLM server against our own fp32 backend: run by `make test-vllm`, which installs vLLM.

The server runs in another environment, whose interpreter `FOVEATE_VLLM_PYTHON` names. It starts in
about a minute on a quiet machine of two cores; here it may take ten.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from engines.bundle import Bundle, open_bundle
from engines.errors import BackendError
from export.build import build_bundle
from export.build.plan import BuildOptions
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.language.served_model import SERVER_OPTIONS, write_served_model
from runtime.backends.chat_server import ServerOptions
from runtime.conversation import Conversation
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.sampling import Sampling
from runtime.model import Model, open_model
from runtime.vision.pictures import load_picture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        "FOVEATE_VLLM_PYTHON" not in os.environ, reason="vLLM: run `make test-vllm`"
    ),
]

POCKET = Path(__file__).parents[3] / "models" / "pocket-llava"
PICTURES = 50
TURNS = 3
START_S = 900
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("pocket") / "bundle"
    build_bundle(
        BuildOptions(str(POCKET), out, precision="fp32", decoders=DecoderOptions(precision="fp32"))
    )
    return open_bundle(out)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[list[str]]:
    with open_model(bundle, threads=1) as model:
        return [converse(model, at) for at in range(PICTURES)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerOptions]:
    root = tmp_path_factory.mktemp("served")
    write_served_model(open_checkpoint(POCKET), root / "pocket")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["FOVEATE_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(root / "pocket"), "--served-model-name", "pocket"]
    command += ["--dtype", "float32", *SERVER_OPTIONS, "--enable-prompt-tokens-details"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", "key"]
    command += ["--data-parallel-size", str(request.param), "--enforce-eager"]  # starts sooner
    with (
        (root / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, start_new_session=True
        ) as process,
    ):
        try:
            wait_until_healthy(process, f"http://127.0.0.1:{port}/health", root / "log")
            yield ServerOptions(f"http://127.0.0.1:{port}/v1", "key", silence_seconds=300)
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # its ranks are processes of their own
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")


def asked_about() -> list[tuple[Path, list[str]]]:
    """The first questions about each held-out picture."""
    asked: dict[str, list[str]] = {}
    for line in (POCKET / "test" / "questions.jsonl").read_text("utf-8").splitlines():
        fields = json.loads(line)
        asked.setdefault(fields["image"], []).append(fields["question"])
    return [(POCKET / "test" / name, texts[:TURNS]) for name, texts in sorted(asked.items())]


def converse(model: Model, at: int) -> list[str]:
    file, questions = asked_about()[at]
    conversation = Conversation(model)
    conversation.show(load_picture(file))
    options = GenerationOptions(max_tokens=24)
    return [conversation.ask(question, options).text for question in questions]


def test_the_text_is_ours(bundle: Bundle, server: ServerOptions, expected: list[list[str]]) -> None:
    """Two conversations at a time, so that two ranks both have work."""
    with (
        open_model(bundle, server=server, threads=1) as model,
        ThreadPoolExecutor(2) as pool,
    ):
        said = list(pool.map(lambda at: converse(model, at), range(PICTURES)))
    assert sum(map(len, said)) == PICTURES * TURNS
    different = [at for at in range(PICTURES) if said[at] != expected[at]]
    assert not different, f"{said[different[0]]} instead of {expected[different[0]]}"


def test_answers_of_a_given_form(bundle: Bundle, server: ServerOptions) -> None:
    picture = load_picture(asked_about()[0][0])
    choices = ("yes", "no", "cylinder")
    options = GenerationOptions(
        grammar=Grammar(choices), sampling=Sampling(temperature=2.0, seed=5), max_tokens=8
    )
    with open_model(bundle, server=server, threads=1) as model:
        answers = [model.ask(picture, f"Is it a {word}?", options) for word in ("box", "ball")]
        schema = Grammar(json_schema='{"type": "nonsense"}')
        with pytest.raises(BackendError, match="nonsense"):
            model.ask(picture, "Is it?", GenerationOptions(grammar=schema))
    assert {answer.text for answer in answers} <= set(choices)
    assert {answer.finish for answer in answers} == {"complete"}


def test_a_stop_string_and_a_limit(bundle: Bundle, server: ServerOptions) -> None:
    picture, question = load_picture(POCKET / "test" / "00001.png"), "List the objects."
    with open_model(bundle, server=server, threads=1) as model:
        stopped = model.ask(picture, question, GenerationOptions(max_tokens=24, stop=("blue",)))
        short = model.ask(picture, question, GenerationOptions(max_tokens=1))
    assert (stopped.finish, stopped.text) == ("stop_string", "yellow cylinder, ")
    assert (short.finish, len(short.token_ids)) == ("max_tokens", 1)


def test_a_wrong_key_is_refused(bundle: Bundle, server: ServerOptions) -> None:
    with pytest.raises(BackendError, match="API key is refused"):
        open_model(bundle, server=ServerOptions(server.url, "other"))
