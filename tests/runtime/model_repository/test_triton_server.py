"""A repository served by the real Triton server: run by `make test-triton`, which installs it.

The server comes from the wheel nvidia-pytriton and has the Python backend alone, so the vision
graph runs on this package's own engine; the rest of the repository is that of the other backends.
Its Python has NumPy 1, which that build of the backend is made for, and is named by
`FOVEATE_TRITON_PYTHON`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from runtime import VisionEncoder
from runtime.model_repository.configs import RepositoryOptions
from runtime.model_repository.repository import write_repository
from runtime.vision import VisualTokens
from runtime.vision.pictures import picture_from_bytes

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        "FOVEATE_TRITON_PYTHON" not in os.environ, reason="Triton: run `make test-triton`"
    ),
]

ROOT = Path(__file__).parents[3]
START_S = 120
MAX_BATCH = 4
BUDGETS = (6, 12)
NUMPY = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}


class RefusedError(Exception):
    """What the server says of a request that it does not answer."""


class Triton:
    """A client of the KServe protocol over HTTP, with tensors as bytes."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> Any:
        with urlopen(f"{self.url}/v2/{path}", timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def infer(self, model: str, pictures: list[bytes]) -> dict[str, np.ndarray]:
        data = b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures)
        tensor = {
            "name": "picture",
            "shape": [len(pictures), 1],
            "datatype": "BYTES",
            "parameters": {"binary_data_size": len(data)},
        }
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
        request = Request(
            f"{self.url}/v2/models/{model}/infer",
            head.encode() + data,
            {"Inference-Header-Content-Length": str(len(head))},
        )
        try:
            answered = urlopen(request, timeout=60)
        except HTTPError as error:
            raise RefusedError(json.loads(error.read())["error"]) from error
        with answered as answer:
            length = int(answer.headers["Inference-Header-Content-Length"])
            told, body = json.loads(answer.read(length)), answer.read()
        outputs, start = {}, 0
        for output in told["outputs"]:
            end = start + output["parameters"]["binary_data_size"]
            flat = np.frombuffer(body[start:end], NUMPY[output["datatype"]])
            outputs[output["name"]] = flat.reshape(output["shape"])
            start = end
        return outputs


@pytest.fixture(scope="module")
def triton(budgets_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    place = tmp_path_factory.mktemp("triton")
    python = Path(os.environ["FOVEATE_TRITON_PYTHON"]).absolute()
    code = "import sysconfig as s; print(*map(s.get_config_var, ('LIBDIR', 'py_version_short')))"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    library, version = told.stdout.split()
    packages = python.parents[1] / "lib" / f"python{version}" / "site-packages"
    installed = packages / "pytriton" / "tritonserver"
    shutil.copytree(installed / "backends", place / "backends")
    stub = installed / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, place / "backends" / "python")
    options = RepositoryOptions(vision="python", max_batch=MAX_BATCH, queue_delay_us=200_000)
    write_repository(budgets_bundle, place / "repo", options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{packages}",
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{library}",
    }
    command = [
        *(str(installed / "bin" / "tritonserver"), f"--model-repository={place / 'repo'}"),
        *(f"--backend-directory={place / 'backends'}", f"--http-port={port}"),
        *("--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"),
        *("--http-thread-count=8", "--strict-readiness=true", "--disable-auto-complete-config"),
    ]
    log = place / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    client = Triton(f"http://127.0.0.1:{port}")
    try:
        wait_until_ready(client, process, log)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(client: Triton, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            client.get("health/ready")
        except (URLError, ConnectionError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    random = np.random.default_rng(0)
    files = []
    for at, kind in enumerate(["PNG", "JPEG", "WEBP", "PNG", "JPEG", "PNG", "PNG", "JPEG"]):
        buffer = io.BytesIO()
        pixels = random.integers(0, 255, (30 + 7 * at, 50, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


def encoded(bundle: Bundle, tokens: int, files: list[bytes]) -> VisualTokens:
    with VisionEncoder(bundle, tokens=tokens) as encoder:
        return encoder.encode([picture_from_bytes(file) for file in files])


def check_equal(outputs: dict[str, np.ndarray], expected: VisualTokens) -> None:
    np.testing.assert_array_equal(outputs["valid_count"][:, 0], expected.valid)
    np.testing.assert_array_equal(outputs["patch_index"], expected.origin)
    np.testing.assert_array_equal(outputs["assignment"], expected.assignment)
    np.testing.assert_allclose(outputs["visual_tokens"], expected.tokens, rtol=0, atol=1e-5)


def test_every_model_is_ready_and_told_as_the_graph_is(
    triton: Triton, budgets_bundle: Bundle
) -> None:
    names = {model["name"] for model in ready_models(triton)}
    assert names == {"foveate_preprocess"} | {
        f"foveate_{kind}{tokens}" for tokens in BUDGETS for kind in ("", "vision_")
    }
    for tokens in BUDGETS:
        graph = budgets_bundle.vision(tokens)
        told = triton.get(f"models/foveate_vision_{tokens}")
        types = {"float32": "FP32", "int64": "INT64"}
        tower, _, projector = budgets_bundle.stages(graph)
        handed_on = {spec.name for spec in projector.inputs}
        left = [spec for spec in graph.outputs if spec.name not in handed_on]
        for side, specs in (("inputs", tower.inputs), ("outputs", left)):
            found = told[side] if side == "inputs" else told[side][1:]
            assert [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in found] == [
                (spec.name, types[spec.dtype], [-1, *(spec.shape[1:] or (1,))]) for spec in specs
            ]
        visual = told["outputs"][0]
        width = budgets_bundle.manifest.text.hidden_size
        assert (visual["name"], visual["shape"]) == ("visual_tokens", [-1, tokens, width])
        ensemble = triton.get(f"models/foveate_{tokens}")
        assert ensemble["platform"] == "ensemble"
        assert ensemble["outputs"] == told["outputs"]
        assert ensemble["inputs"] == [{"name": "picture", "datatype": "BYTES", "shape": [-1, 1]}]
        assert triton.get(f"models/foveate_vision_{tokens}/config")["max_batch_size"] == MAX_BATCH


def ready_models(triton: Triton) -> list[dict[str, str]]:
    with urlopen(Request(f"{triton.url}/v2/repository/index", b"{}")) as answer:
        models: list[dict[str, str]] = json.loads(answer.read())
    assert {model["state"] for model in models} == {"READY"}
    return models


@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize("count", [1, 3])
def test_visual_tokens_are_those_of_the_encoder(
    triton: Triton, budgets_bundle: Bundle, pictures: list[bytes], tokens: int, count: int
) -> None:
    outputs = triton.infer(f"foveate_{tokens}", pictures[:count])
    assert outputs["visual_tokens"].dtype == np.float32
    assert outputs["visual_tokens"].shape == (
        count,
        tokens,
        budgets_bundle.manifest.text.hidden_size,
    )
    check_equal(outputs, encoded(budgets_bundle, tokens, pictures[:count]))


def test_requests_that_come_together_run_as_one_batch(
    triton: Triton, budgets_bundle: Bundle, pictures: list[bytes]
) -> None:
    before = batches_of(triton, "foveate_vision_6")
    with ThreadPoolExecutor(len(pictures)) as pool:
        answers = list(pool.map(lambda file: triton.infer("foveate_6", [file]), pictures))
    for answer, file in zip(answers, pictures, strict=True):
        check_equal(answer, encoded(budgets_bundle, 6, [file]))
    after = batches_of(triton, "foveate_vision_6")
    ran = {size: after[size] - before.get(size, 0) for size in after}
    assert sum(size * count for size, count in ran.items()) == len(pictures)
    assert max(size for size, count in ran.items() if count) in range(2, MAX_BATCH + 1)


def batches_of(triton: Triton, model: str) -> dict[int, int]:
    """How often the model ran with how many pictures."""
    (stats,) = triton.get(f"models/{model}/stats")["model_stats"]
    return {batch["batch_size"]: batch["compute_infer"]["count"] for batch in stats["batch_stats"]}


def test_a_picture_that_cannot_be_read_costs_its_own_request_alone(
    triton: Triton, budgets_bundle: Bundle, pictures: list[bytes]
) -> None:
    def ask(file: bytes) -> dict[str, np.ndarray] | str:
        try:
            return triton.infer("foveate_12", [file])
        except RefusedError as error:
            return str(error)

    files = [pictures[0], b"no picture", pictures[1], b""]
    with ThreadPoolExecutor(len(files)) as pool:
        answers = list(pool.map(ask, files))
    for at in (0, 2):
        answer = answers[at]
        assert isinstance(answer, dict)
        check_equal(answer, encoded(budgets_bundle, 12, [files[at]]))
    assert "is not a picture Foveate reads" in str(answers[1])
    assert "is empty, expected a picture" in str(answers[3])


def test_more_pictures_than_a_batch_holds_are_refused(
    triton: Triton, pictures: list[bytes]
) -> None:
    with pytest.raises(RefusedError, match=f"must be <= {MAX_BATCH}"):
        triton.infer("foveate_6", pictures[: MAX_BATCH + 1])
