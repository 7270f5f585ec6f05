"""Tower, reducers and projector as plans of their own, over stand-ins: what passes stays there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.chained_session import ChainedSession, SharedStages
from engines.errors import EngineError
from engines.manifest import Graph, TensorSpec
from engines.trt.library import TrtLibrary
from engines.trt.opening import wire_reducer
from engines.trt.session import TrtSession
from engines.trt.wiring import Wiring
from tests.fake_tensorrt import DataType, FakeCuda, FakeTensor, Model, TensorIOMode, make_fake_trt

IN, OUT = TensorIOMode.INPUT, TensorIOMode.OUTPUT
FLOAT, INT64 = DataType.FLOAT, DataType.INT64
RANDOM = np.random.default_rng(5)
MOST_TOKENS = 3


def tower(inputs: dict[str, Any]) -> dict[str, Any]:
    pixels = inputs["pixel_values"]
    return {"features": np.stack([pixels, pixels * 2], axis=2), "scores": pixels**2}


def reducer_of(count: int) -> Model:
    def reduce(inputs: dict[str, Any]) -> dict[str, Any]:
        kept = np.argsort(inputs["scores"], axis=1)[:, :count]
        tokens = np.take_along_axis(inputs["features"], kept[:, :, None], 1)
        return {"reduced_tokens": tokens, "patch_index": kept}

    return reduce


def projector(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"visual_tokens": inputs["reduced_tokens"] + 1}


TOWER = (
    FakeTensor("pixel_values", IN, FLOAT, (-1, 4)),
    FakeTensor("features", OUT, FLOAT, (-1, 4, 2)),
    FakeTensor("scores", OUT, FLOAT, (-1, 4)),
)
PROJECTOR = (
    FakeTensor("reduced_tokens", IN, FLOAT, (-1, -2, 2)),
    FakeTensor("visual_tokens", OUT, FLOAT, (-1, -2, 2)),
)


def reducer_tensors(count: int) -> tuple[FakeTensor, ...]:
    return (
        FakeTensor("features", IN, FLOAT, (-1, 4, 2)),
        FakeTensor("scores", IN, FLOAT, (-1, 4)),
        FakeTensor("reduced_tokens", OUT, FLOAT, (-1, count, 2)),
        FakeTensor("patch_index", OUT, INT64, (-1, count)),
    )


def open_stage(
    cuda: FakeCuda,
    tensors: tuple[FakeTensor, ...],
    model: Model,
    wiring: Wiring,
    batches: tuple[int, int, int] = (1, 1, 4),
) -> TrtSession:
    trt = make_fake_trt(cuda, tensors, batches=batches, tokens=(1, 2, MOST_TOKENS), model=model)
    return TrtSession(b"plan", TrtLibrary("tensorrt", trt, "10.3.0.26"), cuda, wiring=wiring)


def open_shared(cuda: FakeCuda, batches: tuple[int, int, int] = (1, 1, 4)) -> SharedStages:
    first = open_stage(
        cuda, TOWER, tower, Wiring(on_device=frozenset({"features", "scores"})), batches
    )
    last = open_stage(
        cuda, PROJECTOR, projector, Wiring(first.stream, frozenset({"reduced_tokens"})), batches
    )
    return SharedStages(first, last)


def chain(
    cuda: FakeCuda,
    shared: SharedStages,
    count: int,
    *,
    owns_shared: bool,
    batches: tuple[int, int, int] = (1, 1, 4),
) -> ChainedSession:
    tensors = reducer_tensors(count)
    specs = tuple(
        TensorSpec(name=one.name, dtype="float32", shape=("batch", 1))
        for one in tensors
        if one.mode is IN
    )
    graph = Graph(file="r.onnx", inputs=specs, outputs=specs, precision="fp32", opset=18)
    wiring = wire_reducer(shared, graph)
    stage = open_stage(cuda, tensors, reducer_of(count), wiring, batches)
    return ChainedSession(shared, stage, owns_shared=owns_shared)


def expect(pixels: Any, count: int) -> dict[str, Any]:
    left = reducer_of(count)(tower({"pixel_values": pixels}))
    return {"visual_tokens": left["reduced_tokens"] + 1, "patch_index": left["patch_index"]}


@pytest.mark.parametrize("batches", [(1, 1, 1), (1, 1, 4), (3, 3, 3)])
def test_two_budgets_run_in_any_order_on_one_tower(batches: tuple[int, int, int]) -> None:
    cuda = FakeCuda()
    shared = open_shared(cuda, batches)
    with (
        chain(cuda, shared, 2, owns_shared=True, batches=batches) as two,
        chain(cuda, shared, 3, owns_shared=False, batches=batches) as three,
    ):
        assert two.output_names == ("visual_tokens", "patch_index")
        budgets = ((two, 2), (two, 2), (three, 3), (three, 3), (three, 3), (two, 2))
        for rows in (1, 1, 4, 6, 1):
            for session, count in budgets:
                pixels = RANDOM.standard_normal((rows, 4)).astype(np.float32)
                results = session.run({"pixel_values": pixels})
                for name, expected in expect(pixels, count).items():
                    np.testing.assert_array_equal(results[name], expected)
        assert cuda.streams == 1
    assert not cuda.memory and not cuda.pinned and not cuda.graphs and cuda.streams == 0


def test_nothing_between_the_stages_is_copied_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    copies: list[str] = []
    with chain(cuda, open_shared(cuda), 2, owns_shared=True) as session:
        for name in ("copy_to_host", "copy_to_device"):
            copy = getattr(cuda, name)

            def noted(*given: Any, name: str = name, copy: Any = copy) -> None:
                copies.append(name)
                copy(*given)

            monkeypatch.setattr(cuda, name, noted)
        session.run({"pixel_values": RANDOM.standard_normal((2, 4)).astype(np.float32)})
    copies.sort()
    told = "pixels in; visual_tokens and patch_index out"
    assert copies == ["copy_to_device", "copy_to_host", "copy_to_host"], told


def test_plans_of_other_batch_sizes_are_refused() -> None:
    cuda = FakeCuda()
    shared = open_shared(cuda, (1, 1, 1))
    with pytest.raises(EngineError, match="do not fit each other"):
        chain(cuda, shared, 2, owns_shared=False, batches=(1, 1, 4))
    shared.projector.close()
    shared.tower.close()
    assert not cuda.memory and not cuda.pinned and cuda.streams == 0
