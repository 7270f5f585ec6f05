"""Every reducer's graph, in each precision a build writes, by NVIDIA's parser and builder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from benchmarks import random_graphs
from engines.frame_size import FrameSize
from engines.manifest import Precision, TensorSpec
from engines.targets import find_target
from engines.trt.batch_profile import ONE_IMAGE, BatchRange, usual_batch
from engines.trt.build_log import BuildLog
from engines.trt.builder import BuildResult, PlanTask, build_plan
from graphs.frame_input import write_frame_input
from tests.graphs.test_frame_input import clip_preprocessing

pytestmark = [pytest.mark.trt, pytest.mark.usefixtures("compiler")]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "mixed", "fp8")
QUANTIZED = ("int8", "mixed", "fp8")
IN_HALF = ("fp16", "mixed", "fp8")
SMS = {"fp8": (89, 120)}
"""What a precision is built for, where it is not 86 and 89: Ampere has no FP8."""
CASES = [(kind, sm) for kind in PRECISIONS for sm in SMS.get(kind, (86, 89))]


@dataclass(frozen=True)
class Exported:
    reducer: str
    file: Path
    inputs: tuple[TensorSpec, ...]


@pytest.fixture(scope="module", params=random_graphs.NAMES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    return Exported(request.param, *random_graphs.write_graph(folder, request.param))


def build(file: Path, inputs: tuple[TensorSpec, ...], precision: Precision, sm: int) -> BuildResult:
    return build_typed(random_graphs.write_typed_graph(file, precision), inputs, precision, sm)


def build_typed(
    typed: Path,
    inputs: tuple[TensorSpec, ...],
    precision: Precision,
    sm: int,
    batch: BatchRange = ONE_IMAGE,
) -> BuildResult:
    target = find_target("rtx-4090").model_copy(update={"sm": sm})
    sha256 = hashlib.sha256(typed.read_bytes()).hexdigest()
    plan = typed.with_name(f"{precision}-{sm}.plan")
    return build_plan(PlanTask(typed, sha256, plan, target, precision, inputs, batch=batch))


@pytest.mark.parametrize(("precision", "sm"), CASES)
def test_a_reducer_parses_and_builds(exported: Exported, precision: Precision, sm: int) -> None:
    result = build(exported.file, exported.inputs, precision, sm)
    types = result.layers.network.output_types
    kinds = result.layers.network.kinds
    assert result.record.plan_bytes > 10_000
    assert_fused(result, precision, attentions_of(random_graphs.TINY))
    assert ("HALF" in types) == (precision in IN_HALF)
    assert ("FP8" in types) == (precision == "fp8")
    assert ("QUANTIZE" in kinds) == (precision in QUANTIZED)
    if precision in QUANTIZED:
        # A layer has six matmuls, and the patch convolution stays in float. Each weight has a DQ,
        # each activation a Q and a DQ for each product that reads it.
        # FP8 has pairs for the four operands of an attention, too.
        pairs = 10 if precision == "fp8" else 6
        layers = kinds["QUANTIZE"] // pairs
        assert layers >= 3
        assert kinds["QUANTIZE"] == pairs * layers
        assert kinds["DEQUANTIZE"] == kinds["QUANTIZE"] + 6 * layers


def test_a_tower_without_a_class_token(tmp_path: Path) -> None:
    """The compiler does not fuse the attention of the layer that is scored by all its queries."""
    file, inputs = random_graphs.write_graph(tmp_path, "visionzip", random_graphs.SIGLIP)
    engine = build(file, inputs, "fp16", 89).layers.engine
    assert engine is not None
    assert engine.fused_attentions == attentions_of(random_graphs.SIGLIP) - 1
    assert engine.quantization_left == 0


@pytest.mark.parametrize("precision", ["mixed", "fp8"])
def test_sums_of_8_bit_products_are_scaled_before_they_are_stored(
    tmp_path: Path, precision: Precision
) -> None:
    """A scale for each channel would be applied to sums in float16, which ends at 65504."""
    file, inputs = random_graphs.write_graph(tmp_path, "none")
    graph = ir.load(random_graphs.write_typed_graph(file, precision)).graph
    scales = [
        node.inputs[1]
        for node in graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    ]
    assert scales and all(scale.shape == () for scale in scales)
    with BuildLog() as log:
        build(file, inputs, precision, 89)
    products = [
        layer
        for layer in log.layers
        if layer["LayerType"] == "gemm" and layer["Inputs"][0]["Datatype"] in ("Int8", "FP8")
    ]
    assert len(products) >= 3
    for layer in products:
        # Left alone, the constant keeps the name of the product: alpha is 1.
        assert not any("MatMul_alpha" in one["Name"] for one in layer["Constants"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed", "fp8"])
def test_a_graph_takes_frames(tmp_path: Path, precision: Precision) -> None:
    file, _ = random_graphs.write_graph(tmp_path, "visionzip")
    typed = random_graphs.write_typed_graph(file, precision)
    side = random_graphs.TINY.image_size
    inputs = write_frame_input(typed, clip_preprocessing(side=side), FrameSize(378, 672))
    result = build_typed(typed, inputs, precision, 89)
    assert result.record.profile["frames"].opt == (1, 378, 672, 3)
    assert_fused(result, precision, attentions_of(random_graphs.TINY))
    # Only TensorRT's own input is uint8: a Cast stands right behind it.
    assert "UINT8" not in result.layers.network.output_types


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("reducer", ["visionzip", "none"])
def test_the_squares_of_a_picture_are_one_run(
    tmp_path: Path, reducer: str, precision: Precision
) -> None:
    file, inputs = random_graphs.write_graph(tmp_path, reducer)
    typed = random_graphs.write_typed_graph(file, precision)
    result = build_typed(typed, inputs, precision, 89, usual_batch(most_squares=5))
    sizes = result.record.profile["pixel_values"]
    assert [sizes.min[0], sizes.opt[0], sizes.max[0]] == [1, 5, 5]
    assert_fused(result, precision, attentions_of(random_graphs.TINY))


@pytest.mark.parametrize("reducer", ["scope", "divprune", "top_attention"])
def test_squares_that_share_a_budget_say_what_their_tokens_are_worth(
    tmp_path: Path, reducer: str
) -> None:
    file, inputs = random_graphs.write_graph(tmp_path, reducer, tells_worth=True)
    typed = random_graphs.write_typed_graph(file, "fp16")
    outputs = {one.name: one.dtype for one in ir.load(typed).graph.outputs}
    assert outputs["token_worth"] is ir.DataType.FLOAT
    result = build_typed(typed, inputs, "fp16", 89, usual_batch(most_squares=5))
    assert result.record.plan_bytes > 10_000


def attentions_of(config: random_graphs.Config) -> int:
    """Return how many layers attend: all but the last, whose features nobody reads."""
    return int(str(config.num_hidden_layers)) - 1


def assert_fused(result: BuildResult, precision: Precision, attentions: int) -> None:
    engine = result.layers.engine
    assert engine is not None
    if precision in IN_HALF:
        assert engine.fused_attentions == attentions
    else:  # the compiler fuses attention in float16 only
        assert engine.fused_attentions == 0
    assert engine.quantization_left == 0
    assert engine.moved_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clip_l_336_builds(tmp_path: Path, precision: Precision) -> None:
    file, inputs = random_graphs.write_graph(tmp_path, "visionzip", random_graphs.CLIP_L_336)
    result = build(file, inputs, precision, 89)
    floor = {"fp32": 1.1e9, "fp16": 0.55e9, "int8": 0.28e9, "mixed": 0.28e9, "fp8": 0.28e9}[
        precision
    ]
    assert floor < result.record.plan_bytes < 1.3 * floor
    assert_fused(result, precision, attentions_of(random_graphs.CLIP_L_336))
