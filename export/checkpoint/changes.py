"""Changes to a checkpoint that come in files of their own: a projector, or LoRA adapters.

Enters: a file or PEFT's directory. Leaves: what is put in the place of a tensor, or added to it.
Each tensor of the files is used, or an error: an adapter half applied answers like another model.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import CheckpointError
from export.checkpoint.original_layout import split_any_name
from export.checkpoint.schema import CheckpointFile, checked, read_json
from export.checkpoint.unpickle import PICKLED, unpickle
from export.checkpoint.weights import Part

Key = tuple[Part, str]
_PEFT_PREFIX = "base_model.model."
_FACTORS = (".lora_A.", ".lora_B.")
_PROJECTOR_TENSORS = {f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}


class _AdapterFile(CheckpointFile):
    """`adapter_config.json`, as PEFT writes it."""

    peft_type: str = "LORA"
    r: int = Field(gt=0, le=65536)
    lora_alpha: float = Field(gt=0)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """What a conversion does to the tensors.

    Attributes:
        put: comes in the place of a tensor.
        factors: (A[r, in], B[out, r]) whose product, times `scale`, is added to a tensor.
        scale: of the products.
        done: what was found, in words.
    """

    put: dict[Key, Tensor] = field(default_factory=dict)
    factors: dict[Key, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    done: tuple[str, ...] = ()

    def apply(self, key: Key, tensor: Tensor) -> Tensor:
        """Return what a tensor becomes, in its own dtype.

        Raises:
            CheckpointError: the change has another shape.
        """
        changed = self.put.get(key, tensor)
        if key in self.factors:
            first, second = self.factors[key]
            if (second.shape[0], first.shape[1]) != tuple(tensor.shape):
                raise _misfit(key, [second.shape[0], first.shape[1]], tensor)
            changed = changed.float() + self.scale * (second.float() @ first.float())
        if changed.shape != tensor.shape:
            raise _misfit(key, list(changed.shape), tensor)
        return changed.to(tensor.dtype)


def _misfit(key: Key, shape: list[int], tensor: Tensor) -> CheckpointError:
    return CheckpointError(
        f"The {key[0].value}'s {key[1]} is {list(tensor.shape)} in the checkpoint and {shape} in "
        "the file that changes it: they are of different models."
    )


def read_changes(projector: Path | None, lora: Path | None, scratch: Path) -> Changes:
    """Read the files that change a checkpoint.

    Args:
        projector: a file with a projector's tensors, in either layout.
        lora: PEFT's directory; LLaVA's `non_lora_trainables.bin` in it counts too.
        scratch: where a pickled file may be converted.

    Raises:
        CheckpointError: a file is missing, damaged, or holds what cannot be applied.
    """
    put: dict[Key, Tensor] = {}
    done: list[str] = []
    factors: dict[Key, tuple[Tensor, Tensor]] = {}
    scale = 1.0
    if lora is not None:
        factors, scale = _read_lora(lora, scratch)
        done.append(f"{len(factors)} LoRA products of {lora}, times {scale:g}, added")
        extra = lora / "non_lora_trainables.bin"
        if extra.is_file():
            put |= _read_named(extra, scratch)
            done.append(f"{len(put)} tensors of {extra} put in")
    if projector is not None:
        tensors = _read_named(projector, scratch)
        names = {name for part, name in tensors if part is Part.PROJECTOR}
        if names != _PROJECTOR_TENSORS or len(tensors) != len(names):
            raise CheckpointError(
                f"{projector}: holds {', '.join(name for _, name in sorted(tensors, key=str))}, "
                f"expected the projector's {', '.join(sorted(_PROJECTOR_TENSORS))}."
            )
        put |= tensors
        done.append(f"the projector of {projector} put in")
    return Changes(put, factors, scale, tuple(done))


def read_tensors(file: Path, scratch: Path) -> dict[str, Tensor]:
    """Read a file of tensors, safetensors or pickled.

    Raises:
        CheckpointError: it is damaged, or a pickle that holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist, expected a file of tensors.")
    converted = scratch / f"{uuid.uuid4().hex}.safetensors"
    try:
        if file.suffix in PICKLED:
            unpickle(file, converted)
            return load_file(converted)
        return load_file(file)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors' errors share no base class
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}).") from error
    finally:
        converted.unlink(missing_ok=True)  # what was mapped of it stays


def _read_named(file: Path, scratch: Path) -> dict[Key, Tensor]:
    named: dict[Key, Tensor] = {}
    for stored, tensor in read_tensors(file, scratch).items():
        plain = stored.removeprefix(_PEFT_PREFIX)
        found = split_any_name(plain) or split_any_name(f"multi_modal_projector.{plain}")
        if found is None:
            raise CheckpointError(f"{file}: the tensor {stored} belongs to no part of a LLaVA.")
        named[found] = tensor
    return named


def _read_lora(root: Path, scratch: Path) -> tuple[dict[Key, tuple[Tensor, Tensor]], float]:
    file = root / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"{root}: no adapter_config.json, expected what PEFT writes.")
    config = checked(_AdapterFile, read_json(file), file)
    unknown = [
        name
        for name, usual in (
            *(("use_dora", False), ("fan_in_fan_out", False), ("lora_bias", False)),
            *(("rank_pattern", {}), ("alpha_pattern", {}), ("bias", "none"), ("peft_type", "LORA")),
        )
        if getattr(config, name) != usual
    ]
    if unknown:
        raise CheckpointError(
            f"{file}: {', '.join(unknown)} is not what plain LoRA has. Merge the adapter with "
            "PEFT's merge_and_unload() and save the whole model."
        )
    names = ("adapter_model.safetensors", "adapter_model.bin")
    held = [root / name for name in names if (root / name).is_file()]
    if not held:
        raise CheckpointError(f"{root}: neither {' nor '.join(names)} is there.")
    factors = _pair_factors(read_tensors(held[0], scratch), held[0])
    wrong = [name for (_, name), (first, _) in factors.items() if first.shape[0] != config.r]
    if wrong:
        raise CheckpointError(f"{held[0]}: {wrong[0]} has not the rank {config.r} of {file.name}.")
    root_of = math.sqrt(config.r) if config.use_rslora else config.r
    return factors, config.lora_alpha / root_of


def _pair_factors(tensors: dict[str, Tensor], file: Path) -> dict[Key, tuple[Tensor, Tensor]]:
    """Return A and B of each weight.

    Raises:
        CheckpointError: one is missing, or a tensor is something else.
    """
    halves: dict[Key, dict[str, Tensor]] = {}
    for stored, tensor in tensors.items():
        plain = stored.removeprefix(_PEFT_PREFIX).replace(".default.", ".")
        kind = next((one for one in _FACTORS if one in plain), None)
        key = split_any_name(plain.replace(kind, ".")) if kind else None
        if kind is None or key is None or tensor.ndim != 2:
            raise CheckpointError(
                f"{file}: {stored} is not half of a LoRA product of a LLaVA's matrix. Merge the "
                "adapter with PEFT's merge_and_unload() and save the whole model."
            )
        halves.setdefault(key, {})[kind] = tensor
    single = [name for (_, name), pair in halves.items() if len(pair) != 2]
    if single or not halves:
        raise CheckpointError(
            f"{file}: {single[0] if single else 'nothing'} has both lora_A and lora_B. The "
            "download is incomplete."
        )
    first, second = _FACTORS
    return {key: (pair[first], pair[second]) for key, pair in halves.items()}
