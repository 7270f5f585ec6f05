"""Plan a build: check everything that can be refused before anything is written.

The plan holds the opened checkpoint, the target and the reducer of each budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from calibration.frames.distinct_frames import most_squares
from calibration.int8.options import Int8Options
from calibration.scales.calibration_file import Calibration
from engines.bundle import refuse_occupied
from engines.errors import OptionError
from engines.frame_size import FrameSize, frame_size_from_text
from engines.manifest import QUANTIZED_PRECISIONS, Precision
from engines.option_groups import Given, Typed
from engines.picture_tiles import Newlines, PictureTiles
from engines.targets import Target, find_target
from export.build.cost import BuildCost, predict_cost, refuse_what_cannot_fit
from export.build.tiles import refuse_with_tiles, tiles_of, tiles_with_shared_budget
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.language.language_models import DecoderOptions, check_language_models
from export.options import ModelOption, ReducerOption
from export.reducers import (
    REDUCERS,
    USUAL_BUDGETS,
    Budget,
    Reducer,
    make_reducer,
    reducer_for_budget,
)
from graphs.frame_input import check_frame_size
from graphs.graph_file import HALF_OPSET, check_opset

USUAL_OPSET = 18


def budgets_from_text(text: str) -> tuple[Budget, ...]:
    """Read ``"64"`` or ``"32,64,all"``.

    Raises:
        OptionError: something between the commas is not a number of tokens.
    """
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word != "all" and not word.isdecimal()]
    if wrong:
        raise OptionError(
            f"--tokens {text}: {', '.join(map(repr, wrong))} is not a number of "
            "tokens. Give one or more with commas between them, such as 64 or 32,64,all."
        )
    return tuple("all" if word == "all" else int(word) for word in words)


GraphInput = Literal["float", "uint8"]
GraphOutput = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        model: a LLaVA checkpoint's directory, or the name of a Hugging Face repository.
        out: the bundle's directory.
        target: the device, a name of `engines.targets`.
        reducer: a name of `export.reducers.REDUCERS`.
        tokens: the budgets; without any, what the reducer's options leave. None is 64, unless the
            reducer and its options say a number.
        reducer_options: options of the reducer, which take precedence over what a budget implies.
        precision: of the vision graph; None takes the target's default.
        decoders: which of them the bundle gets.
        opset: of the vision graph; None takes 18, or 19 where float16 is quantized.
        graph_input: ``float``: normalised pixels; ``uint8``: a camera's frame, which the graph
            resizes and normalises.
        frame: size of the frames, for ``uint8``.
        graph_output: what the visual tokens are.
        newlines: of a checkpoint that cuts pictures into tiles, what ends a row after reduction.
        picture_tokens: of such a checkpoint, the most tokens of a picture, newlines not counted;
            its squares share them by content. None: each square has a budget of its own.
        int8: frames or a calibration, for the precisions ``int8``, ``mixed`` and ``fp8``.
        targets_file: a TOML file of the user's own targets.
        overwrite: replace a bundle that is already there.
    """

    model: ModelOption
    out: Annotated[Path, typer.Option(help="Directory of the bundle.")]
    target: Annotated[str, typer.Option(help="Device; `python -m engines.targets` lists them.")] = (
        "cpu"
    )
    reducer: ReducerOption = "visionzip"
    tokens: Annotated[
        tuple[Budget, ...] | None,
        typer.Option(
            help="Visual tokens to leave (64 if left out); of each tile, where the checkpoint cuts "
            "a picture into tiles. Several, such as 64,192,all, are "
            "budgets with one tower for all; `runtime.ask --visual-tokens` chooses."
        ),
        Typed(budgets_from_text),
    ] = None
    reducer_options: Annotated[Mapping[str, int | float | str], Given(*REDUCERS.values())] = field(
        default_factory=dict
    )
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the vision graph; left out, the target's default."),
    ] = None
    decoders: DecoderOptions = field(default_factory=DecoderOptions)
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX operator set: 17, 18 or 19; left out, 18, or 19 where INT8 needs."),
    ] = None
    graph_input: Annotated[
        GraphInput,
        typer.Option(
            "--input",
            help="What the vision graph takes: float, pixels that the CPU has resized and "
            "normalised; uint8, a camera's frame as it is, of the size --frame. The latter saves "
            "the CPU that work where a GPU runs the graph.",
        ),
    ] = "float"
    frame: Annotated[
        FrameSize | None,
        typer.Option(
            help="Height and width of the camera's frames for --input uint8, such as 1080x1920, or "
            "378x672 where a Jetson's scaler (nvvidconv) makes them small."
        ),
        Typed(frame_size_from_text),
    ] = None
    graph_output: Annotated[
        GraphOutput,
        typer.Option(
            "--output",
            help="Visual tokens in fp32, or in fp16 for a language model that reads them on the "
            "device.",
        ),
    ] = "fp32"
    newlines: Annotated[
        Newlines,
        typer.Option(
            help="Of a checkpoint that cuts a picture into tiles, where a reducer left tokens out: "
            "rows, its newline ends each row of the picture that has a token, as in training; "
            "none, as in VisionZip's released code. All tokens always have them."
        ),
    ] = "rows"
    picture_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a checkpoint that cuts a picture into tiles: one budget for the whole "
            "picture, newlines not counted, instead of --tokens for each tile. Tiles share it by "
            "what they show: the tokens that add most are kept, wherever they are, and --tokens is "
            "the most that one tile leaves. For scope, divprune and top_attention. Example: "
            "--reducer scope --tokens 64 --picture-tokens 160.",
        ),
    ] = None
    int8: Int8Options = field(default_factory=Int8Options)
    targets_file: Annotated[
        Path | None, typer.Option("--targets", help="TOML file of your own targets.")
    ] = None
    overwrite: Annotated[bool, typer.Option(help="Replace the bundle at --out.")] = False

    @property
    def budgets(self) -> tuple[Budget | None, ...]:
        """The tokens of each; None is what the reducer's options leave."""
        if self.tokens is not None:
            return self.tokens or (None,)
        if self.reducer == "none":
            return ("all",)
        counted = {"dominant", "contextual"} <= self.reducer_options.keys()
        return (None,) if counted else USUAL_BUDGETS


@dataclass(frozen=True)
class BuildPlan:
    """What will be built, checked before anything slow starts.

    Attributes:
        checkpoint: opened.
        target: the device.
        precision: of the vision graphs.
        reducers: one for each budget.
        opset: of the graphs.
        cost: what it will take.
        record: the calibration to be used again, if one is.
        tiles: how a picture is cut; None where it is one square.
    """

    checkpoint: Checkpoint
    target: Target
    precision: Precision
    reducers: tuple[Reducer, ...]
    opset: int
    cost: BuildCost
    record: Calibration | None = None
    tiles: PictureTiles | None = None

    @property
    def shares_budget(self) -> bool:
        """Whether the squares of a picture share one budget, so that graphs tell tokens' worth."""
        return self.tiles is not None and self.tiles.picture_tokens is not None

    @property
    def patches(self) -> int:
        """How many patches the tower makes of a square."""
        return self.checkpoint.patch_side**2


def plan_build(options: BuildOptions) -> BuildPlan:
    """Check the options against the target, the checkpoint and the disk.

    Raises:
        FoveateError: something cannot be served; nothing was written.
    """
    target = find_target(options.target, options.targets_file)
    precision = target.check_precision(options.precision or target.default_precision)
    record = options.int8.check(precision)
    _check_frame(options)
    opset = _choose_opset(options.opset, precision, target)
    refuse_occupied(options.out, options.overwrite)
    checkpoint = open_checkpoint(options.model)
    refuse_with_tiles(checkpoint, options.frame is not None)
    if options.frame is not None:
        check_frame_size(checkpoint.preprocessing, options.frame)
    check_language_models(checkpoint, options.decoders)
    reducers = tuple(_choose_reducer(options, budget, checkpoint) for budget in options.budgets)
    tiles = tiles_of(checkpoint, options.newlines)
    if options.picture_tokens is not None:
        tiles = tiles_with_shared_budget(tiles, options.picture_tokens, reducers, checkpoint)
    frames = options.int8.choice.max_frames if options.int8.frames is not None else 0
    squares = most_squares(frames) if tiles is not None and frames else frames
    cost = predict_cost(checkpoint.weights, precision, len(reducers), options.decoders, squares)
    refuse_what_cannot_fit(cost, options.out, options.decoders)
    return BuildPlan(checkpoint, target, precision, reducers, opset, cost, record, tiles)


def _check_frame(options: BuildOptions) -> None:
    if (options.graph_input == "uint8") == (options.frame is not None):
        return
    if options.frame is None:
        raise OptionError(
            "--input uint8 without --frame: the graph is made for one size of frames. Give the "
            "camera's, height and width, such as --frame 1080x1920."
        )
    raise OptionError(
        f"--frame {options.frame} without --input uint8: a graph that takes pixels takes frames of "
        "any size. Add --input uint8, or leave --frame out."
    )


def _choose_opset(given: int | None, precision: Precision, target: Target) -> int:
    """Return the operator set: where float16 is quantized, the first that can."""
    quantized_half = target.needs_cuda and precision in QUANTIZED_PRECISIONS
    opset = given or (HALF_OPSET if quantized_half else USUAL_OPSET)
    check_opset(opset)
    if quantized_half and opset < HALF_OPSET:
        raise OptionError(
            f"--opset {opset}: {target.name} runs what is not in 8 bits in float16, which ONNX "
            f"quantizes from opset {HALF_OPSET} on. Leave --opset out to get that."
        )
    return opset


def _choose_reducer(
    options: BuildOptions, budget: Budget | None, checkpoint: Checkpoint
) -> Reducer:
    patches = checkpoint.patch_side**2
    given = dict(options.reducer_options)
    if budget == "all":
        return make_reducer("none", class_token=checkpoint.keeps_class_token)
    if options.reducer == "none":
        given.setdefault("class_token", checkpoint.keeps_class_token)
    return reducer_for_budget(options.reducer, budget, patches, **given)
