"""Write a Triton model repository from a bundle: `python -m runtime.triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engines.cli import JsonOption, VerifyOption, print_json
from runtime.model_repository.configs import RepositoryOptions

EXAMPLES = (
    "python -m runtime.triton build/pocket --out repo/",
    "python -m runtime.triton build/rover --out repo/ --vision tensorrt --max-batch 8",
    "python -m runtime.triton build/rover --out repo/ --vision python --engine openvino",
)


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    *,
    out: Annotated[
        Path, typer.Option(help="Model repository to write to; other models in it stay.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace models that this command wrote.")
    ] = False,
    verify: VerifyOption = True,
    json_output: JsonOption = False,
    options: RepositoryOptions,
) -> None:
    """Write a model repository for NVIDIA's Triton server: a picture in, visual tokens out.

    For each vision graph there are three models: one in Python that makes `pixel_values` of the
    bytes of a picture, the graph itself, and the ensemble of both, which clients call. Triton
    batches the pictures of concurrent requests.

    Triton's Python needs this package: `pip install foveate` in its container.
    """
    from engines.bundle import open_bundle
    from runtime.model_repository.repository import write_repository

    written = write_repository(
        open_bundle(bundle, verify=verify), out, options, overwrite=overwrite
    )
    if json_output:
        print_json({"models": [str(folder) for folder in written]})
        return
    for folder in written:
        print(folder)
