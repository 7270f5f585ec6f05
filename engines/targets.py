"""Deployment targets: what a device can do and which engine runs the graph there.

The targets come from `targets.toml` of this package. A file of the user in the same form adds
tables or replaces fields. `python -m engines.targets` prints the table.
"""

from __future__ import annotations

import difflib
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines import cli
from engines.errors import OptionError
from engines.manifest import Precision

EXAMPLES = ("python -m engines.targets --targets my_robot.toml",)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FREE_SHARE = 0.85
"""Share of the memory left once the system has its own, where a target does not say `free_gb`."""
Engine = Literal["ort", "openvino", "tensorrt", "tensorrt-rtx"]
LlmBackend = Literal["ort", "llamacpp", "openvino", "vllm"]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+){0,3}$")]
Positive = Annotated[float, Field(gt=0)]


class Target(BaseModel):
    """A device, or a kind of device, that a bundle is built for.

    Peaks are dense and unreachable in practice; None where they depend on the machine at hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    engine: Engine
    """What runs the vision graph."""
    precisions: tuple[Precision, ...] = Field(min_length=1)
    default_precision: Precision
    llm_backend: LlmBackend
    """What runs the language model unless the user says otherwise."""
    sm: int | None = None
    """CUDA compute capability without its dot: 87 for 8.7."""
    memory_gb: Positive | None = None
    free_gb: Positive | None = None
    """What the system leaves of the memory."""
    memory_is_shared: bool = False
    """CPU and GPU use the same memory, as on every Jetson."""
    bandwidth_gb_s: Positive | None = None
    fp16_tflops: Positive | None = None
    int8_tops: Positive | None = None
    workspace_mb: int | None = Field(default=None, gt=0)
    """Scratch memory the TensorRT builder may plan with."""
    tensorrt_min: Version | None = None
    """Oldest TensorRT (TensorRT-RTX for that engine) that knows the device."""
    tensorrt_without: tuple[Version, ...] = ()
    """Later releases that were shipped without kernels for the device."""
    jetpack: dict[Version, Version] = {}
    """JetPack -> the TensorRT it carries."""
    sources: dict[str, str] = {}
    """Field -> where its number comes from."""

    @model_validator(mode="after")
    def _check_whole(self) -> Target:
        if self.default_precision not in self.precisions:
            raise ValueError(
                f"default_precision {self.default_precision!r} is not one of precisions "
                f"{', '.join(self.precisions)}"
            )
        if self.needs_cuda and (self.sm is None or self.workspace_mb is None):
            raise ValueError(f"engine {self.engine!r} needs sm and workspace_mb")
        return self

    @property
    def needs_cuda(self) -> bool:
        """Whether the vision engine runs on an NVIDIA GPU."""
        return self.engine in ("tensorrt", "tensorrt-rtx")

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Compute capability as (major, minor), (8, 7) for sm 87."""
        return None if self.sm is None else divmod(self.sm, 10)

    @property
    def free_bytes(self) -> float:
        """Memory that is left for models; 0 where the target does not say."""
        most = (self.memory_gb or 0) * 1e9 * FREE_SHARE
        return most if self.free_gb is None else min(self.free_gb * 1e9, most)

    def check_precision(self, precision: str) -> Precision:
        """Return ``precision`` if the target takes it.

        Raises:
            OptionError: it does not; the message lists what it takes.
        """
        for known in self.precisions:
            if known == precision:
                return known
        raise OptionError(
            f"--precision {precision}: target {self.name} ({self.title}) takes "
            f"{', '.join(self.precisions)}. Use --precision {self.default_precision}, "
            f"or another --target (python -m engines.targets lists them)."
        )

    @property
    def jetpack_releases(self) -> str:
        """The JetPacks that serve the target, in words; empty off a Jetson."""
        return ", ".join(f"JetPack {name} ({trt})" for name, trt in self.jetpack.items())

    def explain_unsupported_tensorrt(self, version: str) -> str | None:
        """Return why a TensorRT version cannot serve the target, or None if it can."""
        found = version_tuple(version)
        if self.tensorrt_min and found < version_tuple(self.tensorrt_min):
            return f"{self.name} needs TensorRT {self.tensorrt_min} or newer, this is {version}"
        for missing in self.tensorrt_without:
            wanted = version_tuple(missing)
            if found[: len(wanted)] == wanted:
                return f"TensorRT {version} was shipped without kernels for sm_{self.sm}"
        return None


def version_tuple(version: str) -> tuple[int, ...]:
    """Return "10.3.0" as (10, 3, 0), so that versions compare as numbers."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def load_targets(extra: Path | None = None) -> dict[str, Target]:
    """Return every target by name; tables of ``extra`` replace fields of the built-in ones or add.

    Raises:
        OptionError: ``extra`` cannot be read or is not of the form; all problems at once.
    """
    builtin = resources.files("engines").joinpath("targets.toml").read_text("utf-8")
    tables = _parse_tables(builtin, "engines/targets.toml")
    if extra is not None:
        try:
            text = extra.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"--targets {extra}: cannot be read ({error}). "
                f"Give a TOML file of the form of engines/targets.toml."
            ) from error
        for name, table in _parse_tables(text, str(extra)).items():
            tables[name] = _merge_tables(tables.get(name, {}), table)
    source = str(extra or "engines/targets.toml")
    problems: list[str] = []
    targets = {}
    for name in tables:
        try:
            targets[name] = Target(name=name, **_inherit_fields(name, tables, ()))
        except ValidationError as error:
            problems += [_describe_problem(name, item) for item in error.errors()]
        except OptionError as error:
            problems.append(str(error))
    if problems:
        raise OptionError(f"{source}: " + "; ".join(problems) + ". Correct the file.")
    return targets


def find_target(name: str, extra: Path | None = None) -> Target:
    """Return the target called ``name``.

    Raises:
        OptionError: there is none; the message lists the names and the nearest one.
    """
    targets = load_targets(extra)
    if name in targets:
        return targets[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), targets, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise OptionError(
        f"--target {name}: there is no such target. {hint}Known: {', '.join(targets)}. "
        f"Describe your own in a TOML file and pass --targets FILE."
    )


def targets_of_gpu(sm: int, engine: Engine) -> str:
    """Return the options that name a GPU, "--target h100 or --target h200", or how to add one."""
    names = [
        name for name, item in load_targets().items() if (item.sm, item.engine) == (sm, engine)
    ]
    if names:
        return " or ".join(f"--target {name}" for name in names)
    return f"a target of your own with sm = {sm} (--targets FILE)"


def _parse_tables(text: str, source: str) -> dict[str, dict[str, Any]]:
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{source}: not valid TOML: {error}. Correct the file.") from error
    wrong = [name for name, table in document.items() if not isinstance(table, dict)]
    if wrong:
        raise OptionError(
            f"{source}: {', '.join(wrong)} stand outside a table; put each target in a table of "
            f"its own, for example [my-robot]."
        )
    return document


def _merge_tables(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    sources = {**base.get("sources", {}), **over.get("sources", {})}
    return {**base, **over, **({"sources": sources} if sources else {})}


def _inherit_fields(
    name: str, tables: dict[str, dict[str, Any]], seen: tuple[str, ...]
) -> dict[str, Any]:
    table = tables[name]
    base = table.get("like")
    if base is None:
        return table
    if base not in tables or base in (*seen, name):
        raise OptionError(f'[{name}] like = "{base}" is not another target of this file or ours')
    merged = _merge_tables(_inherit_fields(base, tables, (*seen, name)), table)
    return {field: value for field, value in merged.items() if field != "like"}


def _describe_problem(name: str, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    return f"[{name}] {where}: {item['msg']}".replace(" : ", " ")


_WIDE_COLUMNS = 120
"""A narrower terminal is shown fewer columns rather than numbers cut short."""


def _print_table(targets: dict[str, Target]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Dense peaks. --json tells all of it, with where each number comes from.",
        caption_justify="left",
    )
    wide = console.width >= _WIDE_COLUMNS
    table.add_column("target", no_wrap=True)
    table.add_column("device")
    table.add_column("engine", no_wrap=True)
    for column in ("SM", "GB", "GB/s", "FP16 TFLOPS", "INT8 TOPS"):
        table.add_column(column if wide else column.split()[0], justify="right", no_wrap=True)
    if wide:
        table.add_column("precisions (default first)", no_wrap=True)
        table.add_column("LLM", no_wrap=True)
    for target in targets.values():
        numbers = (
            target.sm,
            target.memory_gb,
            target.bandwidth_gb_s,
            target.fp16_tflops,
            target.int8_tops,
        )
        rest = [item for item in target.precisions if item != target.default_precision]
        more = (" ".join([target.default_precision, *rest]), target.llm_backend) if wide else ()
        table.add_row(
            target.name,
            target.title,
            target.engine,
            *("-" if number is None else f"{number:g}" for number in numbers),
            *more,
        )
    console.print(table)


def main(
    *,
    targets: Annotated[
        Path | None, typer.Option(help="Your own targets, a TOML file merged over the built-in.")
    ] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """List the devices a bundle can be built for, with where each number comes from (--json)."""
    known = load_targets(targets)
    if as_json:
        cli.print_json({name: target.model_dump() for name, target in known.items()})
    else:
        _print_table(known)


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
