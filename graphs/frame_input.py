"""Let a vision graph take camera frames: resizing and normalisation become nodes of the graph.

A frame of one size, uint8[B, H, W, 3], becomes the `pixel_values` that `runtime.vision.preprocess`
makes of it, to 1 level of 255. Each axis is resized by the product with a constant matrix and
rounded to whole levels, in Pillow's order. Padding is a constant that is added, and the crop leaves
columns of the matrix away. All of it is float32: the bits that float16 lacks keep other patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from PIL import Image

from engines.errors import OptionError
from engines.frame_size import FRAMES_INPUT, FrameSize
from engines.manifest import Preprocessing, TensorSpec
from engines.staging import staged_file
from graphs.modules import MODULE_KEY
from runtime.vision.geometry import Geometry, lay_out
from runtime.vision.resize import resizes_rows_first

MODULE = "pixels"
"""The module that the nodes are named after."""

_ROWS, _COLUMNS = 2, 3

Floats = NDArray[np.float32]


def write_frame_input(
    file: Path, preprocessing: Preprocessing, size: FrameSize
) -> tuple[TensorSpec, ...]:
    """Let a graph on the disk take frames; its weights stay where they are.

    Args:
        file: a vision graph that takes `pixel_values`; it is replaced.
        preprocessing: the checkpoint's.
        size: of the frames.

    Returns:
        The inputs it has now.

    Raises:
        OptionError: the graph takes no float32 pixels, or its crop is larger than the picture.
        BundleError: the preprocessing does not lead from frames of that size to the graph's.
    """
    model = ir.load(file)
    take_frames(model, preprocessing, size)
    with staged_file(file) as staged:
        ir.save(model, staged)
        onnx.checker.check_model(str(staged), full_check=True)
    shape = ("batch", size.height, size.width, 3)
    return (TensorSpec(name=FRAMES_INPUT, dtype="uint8", shape=shape),)


def take_frames(model: ir.Model, preprocessing: Preprocessing, size: FrameSize) -> None:
    """Put the preprocessing before a graph, in place.

    Args:
        model: takes `pixel_values`, float32[batch, 3, height, width], and from now on `frames`,
            uint8[batch, H, W, 3] in RGB.
        preprocessing: the checkpoint's.
        size: H and W.

    Raises:
        OptionError: the graph takes no float32 pixels, or its crop is larger than the picture.
        BundleError: the preprocessing does not lead from frames of that size to the graph's.
    """
    (pixels,) = model.graph.inputs
    if pixels.name == FRAMES_INPUT or pixels.dtype is not ir.DataType.FLOAT or pixels.shape is None:
        raise OptionError(
            f"The graph takes {pixels.name} ({pixels.dtype}), expected float32 pixel_values."
        )
    batch = pixels.shape[0]
    frames = ir.Value(
        name=FRAMES_INPUT,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([batch, size.height, size.width, 3]),
    )
    at = check_frame_size(preprocessing, size)
    colour = np.array([int(value * 255) for value in preprocessing.mean], np.float32)
    stage = _Stage(model.graph, batch)
    value = stage.add("Cast", frames, shape=(size.height, size.width, 3), to=ir.DataType.FLOAT)
    value = stage.add("Transpose", value, shape=(3, size.height, size.width), perm=[0, 3, 1, 2])
    for each in plan_axes(at, preprocessing.resample):
        value = stage.resize(value, each, colour)
    value = stage.normalise(value, preprocessing)
    pixels.replace_all_uses_with(value)
    model.graph.inputs[0] = frames
    model.graph.insert_before(model.graph[0], stage.nodes)


def check_frame_size(preprocessing: Preprocessing, size: FrameSize) -> Geometry:
    """Return where the pixels of such frames go.

    Raises:
        OptionError: the crop is larger than the resized frame.
        BundleError: the preprocessing does not lead from frames of that size to the graph's.
    """
    at = lay_out(size.height, size.width, preprocessing)
    if at.crop_top < 0 or at.crop_left < 0:
        raise OptionError(
            f"The preprocessing cuts {at.crop_width} x {at.crop_height} out of a frame that is "
            f"resized to {at.resized_width} x {at.resized_height}, and a graph that takes frames "
            "fills no borders. Build without --input uint8."
        )
    return at


@dataclass(frozen=True, eq=False)
class AxisResize:
    """How one axis of a frame is padded, resized and cut.

    Attributes:
        axis: 2 for rows, 3 for columns.
        start: first pixel that is read.
        stop: one behind the last.
        matrix: float32[stop - start, made], from levels read to levels made; None where the axis
            is only cut.
        padding: float32[made]; the padding's share in what is made.
    """

    axis: int
    start: int
    stop: int
    matrix: Floats | None
    padding: Floats


def plan_axes(at: Geometry, resample: str) -> tuple[AxisResize, ...]:
    """Return how the axes of a frame are resized, in order.

    Args:
        at: where the frame's pixels go.
        resample: name of one of Pillow's filters.
    """
    rows = _plan(
        _ROWS,
        _weights(at.padded_height, at.resized_height, resample),
        slice(at.pad_top, at.pad_top + at.height),
        slice(max(at.crop_top, 0), at.crop_top + at.crop_height),
    )
    columns = _plan(
        _COLUMNS,
        _weights(at.padded_width, at.resized_width, resample),
        slice(at.pad_left, at.pad_left + at.width),
        slice(max(at.crop_left, 0), at.crop_left + at.crop_width),
    )
    lost_rows, lost_columns = (
        at.padded_height - at.resized_height,
        at.padded_width - at.resized_width,
    )
    return (rows, columns) if resizes_rows_first(lost_rows, lost_columns) else (columns, rows)


def _weights(source: int, resized: int, resample: str) -> Floats:
    """Return what each source pixel adds to each resized one, float32[source, resized].

    They are what Pillow makes of pictures with one bright pixel.
    """
    basis = Image.fromarray(np.eye(source, dtype=np.float32))
    return np.asarray(basis.resize((resized, source), Image.Resampling[resample.upper()]))


def _plan(axis: int, weights: Floats, picture: slice, crop: slice) -> AxisResize:
    kept = weights[:, crop]
    inside = kept[picture]
    padding = kept.sum(axis=0) - inside.sum(axis=0)
    read = np.flatnonzero(inside.any(axis=1))
    start, stop = int(read[0]), int(read[-1]) + 1
    matrix = np.ascontiguousarray(inside[start:stop])
    only_cut = matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix)))
    return AxisResize(axis, start, stop, None if only_cut else matrix, padding)


class _Stage:
    """Nodes from frames to `pixel_values`, with the shapes of what they make."""

    def __init__(self, graph: ir.Graph, batch: int | ir.SymbolicDim) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._batch = batch

    def add(
        self, op: str, *inputs: ir.Value, shape: tuple[int, ...], **attributes: Any
    ) -> ir.Value:
        """Add a node that makes float32[batch, *shape]."""
        node = ir.node(op, list(inputs), attributes, name=f"{MODULE}/{op}_{len(self.nodes)}")
        node.metadata_props[MODULE_KEY] = MODULE
        self.nodes.append(node)
        output = node.outputs[0]
        output.name, output.type = f"{node.name}:0", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([self._batch, *shape])
        return output

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add a constant, or return the one that has this name."""
        name = f"{MODULE}.{name}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            self._graph.register_initializer(
                ir.Value(
                    name=name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(array.shape),
                    const_value=tensor,
                )
            )
        return self._graph.initializers[name]

    def resize(self, value: ir.Value, plan: AxisResize, colour: Floats) -> ir.Value:
        """Cut one axis of levels, float32[batch, 3, rows, columns], and resize it."""
        shape = [int(size) for size in value.shape[1:]]  # type: ignore[index, arg-type]
        word = "rows" if plan.axis == _ROWS else "columns"
        if plan.stop - plan.start < shape[plan.axis - 1]:
            shape[plan.axis - 1] = plan.stop - plan.start
            span = {"start": plan.start, "stop": plan.stop, "axis": plan.axis}
            limits = [
                self.constant(f"{word}_{name}", np.array([at], np.int64))
                for name, at in span.items()
            ]
            value = self.add("Slice", value, *limits, shape=tuple(shape))
        if plan.matrix is None:
            return value
        shape[plan.axis - 1] = plan.matrix.shape[1]
        matrix = plan.matrix if plan.axis == _COLUMNS else np.ascontiguousarray(plan.matrix.T)
        weight = self.constant(f"{word}_weight", matrix)
        factors = (value, weight) if plan.axis == _COLUMNS else (weight, value)
        value = self.add("MatMul", *factors, shape=tuple(shape))
        # Half a level more, so that Floor rounds as Pillow does.
        ground = colour[:, None] * plan.padding + np.float32(0.5)  # [3, made]
        ground = ground[:, None, :] if plan.axis == _COLUMNS else ground[:, :, None]
        value = self.add("Add", value, self.constant(f"{word}_ground", ground), shape=tuple(shape))
        value = self.add("Floor", value, shape=tuple(shape))
        ends = [
            self.constant(name, np.array(level, np.float32))
            for name, level in (("black", 0), ("white", 255))
        ]
        return self.add("Clip", value, *ends, shape=tuple(shape))

    def normalise(self, value: ir.Value, preprocessing: Preprocessing) -> ir.Value:
        """Turn levels of the final size into `pixel_values`."""
        steps = (
            ("Mul", "scale", np.array(preprocessing.rescale_factor, np.float32)),
            ("Sub", "mean", np.array(preprocessing.mean, np.float32)[:, None, None]),
            ("Div", "deviation", np.array(preprocessing.std, np.float32)[:, None, None]),
        )
        shape = (3, preprocessing.height, preprocessing.width)
        for op, name, constant in steps:
            value = self.add(op, value, self.constant(name, constant), shape=shape)
        return value
