"""Read and write TensorRT plans with a signed sidecar that says what built them.

A plan is code that runs only with the exact library version and on the GPU that built it. It is
read only when its sidecar agrees with this machine in every point and carries the signature of this
user, whose key never leaves the machine.
"""

from __future__ import annotations

import glob
import hashlib
import hmac
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.bundle import Bundle
from engines.errors import EngineError
from engines.gpu import Gpu
from engines.manifest import Graph, Precision
from engines.manifest_fields import Sha256
from engines.staging import staged_file
from engines.targets import Target
from engines.trt.library import LibraryName, TrtLibrary

Buffer = bytes | bytearray | memoryview
KEY_VARIABLE = "FOVEATE_PLAN_KEY"
"""Environment variable that names the file of the key, for containers that lose the home."""
_log = logging.getLogger(__name__)


class ShapeRange(BaseModel):
    """Shapes of one input that a plan takes; it is optimised for `opt`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class PlanRecord(BaseModel):
    """The content of `<plan>.json`, the sidecar of a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    onnx_file: str
    onnx_sha256: Sha256
    plan_sha256: Sha256 = "0" * 64
    plan_bytes: int = 0
    library: LibraryName
    library_version: str
    """To the build number."""
    target: str
    precision: Precision
    sm: int
    gpu: str | None
    """The GPU's name; None when it was built ahead of time, for any GPU of that SM."""
    multiprocessors: int | None = None
    """Of the GPU. AGX Orin, Orin NX and Orin Nano have one name and differ here."""
    power_mode: str | None = None
    """Of a Jetson when the plan was built: it decides which kernels were fastest."""
    driver: str | None
    profile: dict[str, ShapeRange]
    flags: tuple[str, ...]
    workspace_bytes: int
    optimization_level: int | None = None
    """0 to 5, how long the builder looked for fast kernels; None is TensorRT's default."""
    context_bytes: int | None = None
    """Activations and scratch memory of one context; None where no GPU could open the plan."""
    build_seconds: float
    built_at: str
    foveate: str
    signature: str = ""
    """HMAC of everything else under the key of the user who built or adopted it."""


@dataclass(frozen=True)
class Machine:
    """What a plan must have been built for to be run here."""

    onnx_sha256: str
    library: LibraryName
    library_version: str
    sm: int
    gpu: str
    driver: str
    multiprocessors: int | None = None
    power_mode: str | None = None


def machine_here(
    onnx_sha256: str,
    library: TrtLibrary,
    target: Target,
    gpu: Gpu | None,
    power_mode: str | None = None,
) -> Machine:
    """Return what a plan of a graph must have been built for; no GPU where it is built ahead."""
    return Machine(
        onnx_sha256=onnx_sha256,
        library=library.name,
        library_version=library.version,
        sm=gpu.sm if gpu else target.sm or 0,
        gpu=gpu.name if gpu else "",
        driver=gpu.driver if gpu else "",
        multiprocessors=gpu.multiprocessors if gpu else None,
        power_mode=power_mode,
    )


def plan_name(graph: Graph, target: Target, batch: int = 1) -> str:
    """Return the file name of a graph's plan for a target and up to `batch` images in one run."""
    several = f"-b{batch}" if batch != 1 else ""
    return f"{Path(graph.file).stem}-{target.engine}-sm{target.sm}{several}.plan"


def plan_path(bundle: Bundle, graph: Graph, target: Target, batch: int = 1) -> Path:
    """Return where the plan of a graph for a target and up to `batch` images in one run lies."""
    return bundle.local / plan_name(graph, target, batch)


def find_plan(bundle: Bundle, graph: Graph, target: Target, batch: int = 1) -> Path:
    """Return the plan to run `batch` images with: the smallest that takes all, else the largest.

    Where no plan was built, the path of the plan for one image.
    """
    one = plan_path(bundle, graph, target)
    stem = re.escape(one.stem)
    sizes = {1} if one.exists() else set()
    for path in bundle.local.glob(f"{glob.escape(one.stem)}-b*.plan"):
        found = re.fullmatch(rf"{stem}-b(\d+)", path.stem)
        if found:
            sizes.add(int(found[1]))
    enough = [size for size in sizes if size >= batch]
    size = min(enough) if enough else max(sizes, default=1)
    return plan_path(bundle, graph, target, size)


def rebuild_hint(plan: Path) -> str:
    """Return what to do about a plan that does not fit."""
    bundle = plan.parent.parent
    return f"Build it again on this machine: `python -m engines.build {bundle} --rebuild`"


def sidecar_path(plan: Path) -> Path:
    """Return where the sidecar of a plan lies."""
    return plan.with_name(f"{plan.name}.json")


def write_plan(plan: Path, data: Buffer, record: PlanRecord) -> PlanRecord:
    """Write a plan and its signed sidecar; a reader meets both or neither.

    Returns:
        The record with digest, size and signature filled in.

    Raises:
        EngineError: the place cannot be written or the disk is full.
    """
    view = memoryview(data)
    digest = hashlib.sha256(view).hexdigest()
    whole = record.model_copy(update={"plan_sha256": digest, "plan_bytes": view.nbytes})
    signed = sign_record(whole)
    sidecar_path(plan).unlink(missing_ok=True)
    with staged_file(plan, EngineError) as staged:
        staged.write_bytes(view)
    _write_sidecar(plan, signed)
    return signed


def read_record(plan: Path) -> PlanRecord:
    """Read a plan's sidecar.

    Raises:
        EngineError: there is no plan, no sidecar, or it is damaged.
    """
    if not plan.is_file():
        raise EngineError(
            f"{plan}: there is no such plan. Build it on the device that will run it: "
            f"`python -m engines.build {plan.parent.parent}`."
        )
    path = sidecar_path(plan)
    try:
        return PlanRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise EngineError(
            f"{plan}: its sidecar {path.name} is missing, so nobody can say what built the plan. "
            f"{rebuild_hint(plan)}."
        ) from None
    except (OSError, ValidationError) as error:
        count = error.error_count() if isinstance(error, ValidationError) else 1
        raise EngineError(f"{path}: damaged ({count} problems). {rebuild_hint(plan)}.") from error


def list_differences(record: PlanRecord, machine: Machine) -> list[str]:
    """Name every point in which a plan was not built for this graph on this machine."""
    pairs: list[tuple[str, object, object]] = [
        ("the graph's SHA-256", record.onnx_sha256, machine.onnx_sha256),
        ("library", record.library, machine.library),
        ("library version", record.library_version, machine.library_version),
        ("compute capability", f"sm_{record.sm}", f"sm_{machine.sm}"),
    ]
    if record.gpu is not None:
        pairs.append(("GPU", record.gpu, machine.gpu))
        if record.multiprocessors is not None:
            pairs.append(("multiprocessors", record.multiprocessors, machine.multiprocessors))
    return _unequal(pairs)


def list_changes(record: PlanRecord, machine: Machine) -> list[str]:
    """Name what has changed since a plan was built that may make it slower, but not wrong."""
    pairs: list[tuple[str, object, object]] = []
    if record.gpu is not None:
        pairs.append(("driver", record.driver, machine.driver))
        if record.power_mode is not None and machine.power_mode is not None:
            pairs.append(("power mode", record.power_mode, machine.power_mode))
    return _unequal(pairs)


def _unequal(pairs: list[tuple[str, object, object]]) -> list[str]:
    return [
        f"{name}: the plan has {built}, this machine has {here}"
        for name, built, here in pairs
        if built != here
    ]


def read_plan(plan: Path, machine: Machine, *, trust: bool = False) -> tuple[bytes, PlanRecord]:
    """Read a plan that was built for this machine by this user.

    Args:
        plan: the plan's path.
        machine: what it must have been built for.
        trust: accept a plan that somebody else signed. It runs as code of yours.

    Raises:
        EngineError: differences, a changed or truncated plan, or a stranger's signature.
    """
    record = read_record(plan)
    differences = list_differences(record, machine)
    if differences:
        raise EngineError(
            f"{plan} was not built for this: {'; '.join(differences)}. {rebuild_hint(plan)}."
        )
    data = read_checked(plan, record)
    if not trust:
        check_signature(plan, record)
    if changes := list_changes(record, machine):
        _log.warning(
            "%s still runs, but may be slower than a new one: %s. %s.",
            plan,
            "; ".join(changes),
            rebuild_hint(plan),
        )
    return data, record


def read_checked(plan: Path, record: PlanRecord) -> bytes:
    """Read a plan whose bytes are those that were recorded.

    Raises:
        EngineError: they are not.
    """
    data = plan.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.plan_sha256:
        raise EngineError(
            f"{plan}: the plan is damaged or was replaced: its SHA-256 is {digest} ({len(data):,} "
            f"bytes), its sidecar says {record.plan_sha256} ({record.plan_bytes:,} bytes). "
            f"{rebuild_hint(plan)}."
        )
    return data


def check_signature(plan: Path, record: PlanRecord) -> None:
    """Make sure that this user built or adopted a plan.

    Raises:
        EngineError: somebody else did.
    """
    if not is_signed_here(record):
        raise EngineError(
            f"{plan} was not built by this user on this machine (its signature does not fit the "
            f"key {key_path()}). A plan is code that TensorRT runs. {rebuild_hint(plan)}, or "
            f"adopt it, if you know who built it: `python -m engines.build {plan.parent.parent} "
            "--trust`."
        )


def adopt_plan(plan: Path) -> PlanRecord:
    """Sign a plan from elsewhere with this user's key, so that it is trusted from now on.

    Raises:
        EngineError: there is no plan, or its sidecar is missing or damaged.
    """
    signed = sign_record(read_record(plan))
    _write_sidecar(plan, signed)
    return signed


def sign_record(record: PlanRecord) -> PlanRecord:
    """Return the record with this user's signature."""
    return record.model_copy(update={"signature": _signature(record)})


def is_signed_here(record: PlanRecord) -> bool:
    """Return whether this user's key signed the record."""
    return hmac.compare_digest(record.signature, _signature(record))


def seal(data: bytes) -> bytes:
    """Return bytes behind their signature by this user's key."""
    return hmac.digest(_load_key(), data, "sha256") + data


def unseal(sealed: bytes) -> bytes | None:
    """Return what `seal` was given; None where this user's key did not sign it."""
    size = hashlib.sha256().digest_size
    signature, data = sealed[:size], sealed[size:]
    return (
        data if hmac.compare_digest(signature, hmac.digest(_load_key(), data, "sha256")) else None
    )


def key_path() -> Path:
    """Return where this user's key lies."""
    if chosen := os.environ.get(KEY_VARIABLE):
        return Path(chosen).expanduser()
    folder = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser()
    return folder / "foveate" / "plan.key"


def _signature(record: PlanRecord) -> str:
    unsigned = record.model_copy(update={"signature": ""})
    return hmac.new(_load_key(), unsigned.model_dump_json().encode(), "sha256").hexdigest()


def _load_key() -> bytes:
    path = key_path()
    try:
        if path.is_file():
            return path.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        key = secrets.token_bytes(32)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key)
    except FileExistsError:  # another process was first
        return path.read_bytes()
    except OSError as error:
        raise EngineError(
            f"{path}: the key that plans are signed with cannot be read or written ({error}). "
            f"Make the folder writable, or name another file in {KEY_VARIABLE}."
        ) from error
    return key


def _write_sidecar(plan: Path, record: PlanRecord) -> None:
    with staged_file(sidecar_path(plan), EngineError) as staged:
        staged.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
