"""Change what the written vision graphs take and return: frames, float16 visual tokens.

It comes last: calibration, the gate and the change to float16 see pixels and float32 tokens.
"""

from __future__ import annotations

from pathlib import Path

from engines.manifest import Graph, SharedGraphs, TensorSpec, VisionFiles
from export.build.plan import BuildOptions, BuildPlan
from export.vision.vision_module import OUTPUTS
from graphs.frame_input import write_frame_input
from graphs.half_output import write_half_output
from graphs.operator_check import check_graph, oldest_tensorrt

_TOKENS = OUTPUTS[0]


def change_ends(
    files: VisionFiles, plan: BuildPlan, options: BuildOptions, root: Path
) -> VisionFiles:
    """Let the first files take frames and the last ones return float16, as the options say.

    Args:
        files: what was written.
        plan: from `plan_build`.
        options: what it was made from.
        root: the bundle's (staging) directory.

    Returns:
        What the manifest says of them now.

    Raises:
        EngineError: TensorRT would not take a file as it is now.
    """
    stages = [files.stages(graph) for graph in files.graphs]
    changed: dict[str, Graph] = {}
    if options.frame is not None:
        for first in {one[0].file: one[0] for one in stages}.values():
            inputs = write_frame_input(
                root / first.file, plan.checkpoint.preprocessing, options.frame
            )
            changed[first.file] = first.model_copy(update={"inputs": inputs})
    if options.graph_output == "fp16":
        for last in {one[-1].file: one[-1] for one in stages}.values():
            write_half_output(root / last.file, _TOKENS)
            before = changed.get(last.file, last)
            changed[last.file] = before.model_copy(update={"outputs": _halved(last.outputs)})
    if (tensorrt := oldest_tensorrt(plan.target)) is not None:
        for file in changed:
            check_graph(root / file, tensorrt)
    return _described(files, changed)


def _halved(outputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        one.model_copy(update={"dtype": "float16"}) if one.name == _TOKENS else one
        for one in outputs
    )


def _described(files: VisionFiles, changed: dict[str, Graph]) -> VisionFiles:
    graphs = tuple(
        graph.model_copy(
            update={"inputs": changed[graph.file].inputs, "outputs": changed[graph.file].outputs}
        )
        if graph.file in changed
        else graph
        for graph in files.graphs
    )
    shared = files.shared
    if shared is not None:
        shared = SharedGraphs(
            tower=changed.get(shared.tower.file, shared.tower),
            projector=changed.get(shared.projector.file, shared.projector),
        )
    return VisionFiles(graphs=graphs, shared=shared)
