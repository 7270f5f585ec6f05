"""Open and check a LLaVA checkpoint, and load its parts when they are asked for.

Opening reads only configuration and tensor names, so a 7B checkpoint opens at once, and exporting
its vision graph needs memory for the vision tower only.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from engines.errors import CheckpointError
from engines.manifest import Preprocessing, Prompt
from engines.picture_tiles import NEWLINE, Resolution
from export.checkpoint.download import download_checkpoint
from export.checkpoint.kinds import KINDS, CheckpointKind
from export.checkpoint.models import (
    architecture_of,
    causal_lm_of,
    fill,
    wraps_vision_model,
    wrong_tensors,
)
from export.checkpoint.original_layout import is_original
from export.checkpoint.processor import (
    list_tokenizer_files,
    read_chat_template,
    read_preprocessing,
    read_prompt,
    read_resolutions,
    read_tile_preprocessing,
)
from export.checkpoint.schema import ConfigFile, checked, read_json
from export.checkpoint.weights import LlavaWeights, Part, find_weights, write_shards
from export.towers.registry import TOWERS, has_class_token

T = TypeVar("T")

_EMBEDDINGS = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A LLaVA checkpoint on disk.

    Attributes:
        root: its directory.
        name: what to call it.
        kind: which class of transformers it is.
        config: its whole configuration.
        vision_config: configuration of the vision tower.
        text_config: configuration of the language model.
        feature_layers: how many encoder layers run before features are taken, each 1 to all of them
            (LLaVA-1.5: 23 of 24, which its configuration calls -2; ViP-LLaVA: five layers).
        weights: where its tensors lie.
        preprocessing: how a picture becomes `pixel_values`.
        resolutions: height and width in pixels of what is cut into tiles; None where a picture is
            one square.
        checked: parts whose tensors were found to be those of the configuration.
    """

    root: Path
    name: str
    kind: CheckpointKind
    config: Any
    vision_config: PretrainedConfig
    text_config: PretrainedConfig
    feature_layers: tuple[int, ...]
    weights: LlavaWeights
    preprocessing: Preprocessing
    resolutions: tuple[Resolution, ...] | None = None
    checked: set[Part] = field(default_factory=set, compare=False, repr=False)

    @property
    def image_size(self) -> int:
        """Side of the square picture in pixels (LLaVA-1.5: 336)."""
        config: Any = self.vision_config
        return int(config.image_size)

    @property
    def patch_side(self) -> int:
        """Patches along one side of the picture (LLaVA-1.5: 24)."""
        config: Any = self.vision_config
        return self.image_size // int(config.patch_size)

    @property
    def feature_width(self) -> int:
        """Width of a token that the projector reads: the tower's, once for each feature layer."""
        config: Any = self.vision_config
        return int(config.hidden_size) * len(self.feature_layers)

    @property
    def select_strategy(self) -> str:
        """`vision_feature_select_strategy`, "default" or "full"."""
        return self.kind.select_strategy_of(self.config)

    @property
    def keeps_class_token(self) -> bool:
        """Whether the language model was trained with the class token among the visual tokens.

        It decides what `none`, the baseline without reduction, hands on. The papers' reducers
        follow their released code, which gives the class token to the language model (VisionZip)
        or does not (PruMerge) whatever the checkpoint says.
        """
        return self.select_strategy == "full" and has_class_token(self.vision_config)

    def vision_model(self) -> PreTrainedModel:
        """Return the vision tower in float32.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the configuration says.
        """
        self.check(Part.VISION_TOWER)
        state = self.weights.read(Part.VISION_TOWER)
        if wraps_vision_model(self.vision_config):
            state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
        architecture = architecture_of(self.vision_config)
        return fill(self.root, Part.VISION_TOWER, architecture, self.vision_config, state)

    def projector(self) -> nn.Module:
        """Return the projector in float32.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the configuration says.
        """
        self.check(Part.PROJECTOR)
        with torch.device("meta"):
            projector: Any = self.kind.projector(self.config)
        projector.eval()
        projector.load_state_dict(self.weights.read(Part.PROJECTOR), assign=True)
        made: nn.Module = projector.float()
        return made

    def image_newline(self) -> Tensor:
        """Return what ends a row of a picture that was cut into tiles, float32[D].

        Raises:
            CheckpointError: it has another width than the language model.
        """
        self.check(Part.NEWLINE)
        return self.weights.read(Part.NEWLINE)[NEWLINE].float()

    def language_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the language model alone, as a causal LM, in `dtype` or as it is stored.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the configuration says.
        """
        self.check(Part.LANGUAGE_MODEL)
        state = self.weights.read(Part.LANGUAGE_MODEL)
        config = self.plain_text_config()
        stored = dtype or state[_EMBEDDINGS].dtype
        return fill(self.root, Part.LANGUAGE_MODEL, causal_lm_of(config), config, state, stored)

    def check(self, part: Part) -> None:
        """Compare a part's tensors with its configuration; reads headers only.

        Whoever loads a part without this gets random numbers where a tensor is missing.

        Raises:
            CheckpointError: a tensor is missing, too many or has another shape.
        """
        if part in self.checked:
            return
        try:
            expected, optional = _expected_tensors(self, part)
        except Exception as error:  # transformers, given a configuration from elsewhere
            raise wrong_tensors(self.root, part, f"{type(error).__name__}: {error}") from error
        found = self.weights.shapes(part)
        problems = {
            "missing": sorted(set(expected) - set(found) - optional),
            "unexpected": sorted(set(found) - set(expected)),
            "another shape": [
                f"{name} is {list(found[name])}, expected {list(shape)}"
                for name, shape in sorted(expected.items())
                if name in found and found[name] != shape
            ],
        }
        told = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        if told:
            raise wrong_tensors(self.root, part, "; ".join(told))
        self.checked.add(part)

    def embedding_table(self) -> Tensor:
        """Return the text embeddings, [V, D] in their stored dtype."""
        self.check(Part.LANGUAGE_MODEL)
        return self.weights.read(Part.LANGUAGE_MODEL, [_EMBEDDINGS])[_EMBEDDINGS]

    def llava(self, **options: Any) -> PreTrainedModel:
        """Return the whole model as transformers loads it: the reference to compare with.

        Raises:
            CheckpointError: a tensor is missing, too many or has another shape.
        """
        for part in self.kind.parts:
            self.check(part)
        model: Any = self.kind.model.from_pretrained(
            self.root, use_safetensors=True, local_files_only=True, **options
        )
        whole: PreTrainedModel = model.eval()
        return whole

    def write_language_model(self, directory: Path) -> None:
        """Write the language model as a plain causal-LM checkpoint, tokenizer included.

        It copies shard by shard, so memory holds one shard at a time.

        Raises:
            CheckpointError: a tensor is missing, too many, has another shape or is not finite.
        """
        self.write_language_config(directory)
        write_shards(self.weights.read_by_shard(Part.LANGUAGE_MODEL), directory)

    def write_language_config(self, directory: Path) -> None:
        """Write the plain causal LM's configuration and tokenizer, without its weights."""
        self.check(Part.LANGUAGE_MODEL)
        directory.mkdir(parents=True, exist_ok=True)
        self.plain_text_config().save_pretrained(directory)
        copied = [*self.tokenizer_files(), self.root / "generation_config.json"]
        for file in filter(Path.is_file, copied):
            shutil.copy2(file, directory / file.name)

    def plain_text_config(self, dtype: torch.dtype | None = None) -> PretrainedConfig:
        """Return the language model's configuration as a plain causal LM has it."""
        config = copy.deepcopy(self.text_config)
        config.architectures = [causal_lm_of(config).__name__]
        config.dtype = dtype or self.embedding_table().dtype
        # LLaVA keeps the flag for its own head; the plain model needs it as its own.
        config.tie_word_embeddings = bool(self.config.tie_word_embeddings)
        return config

    def tokenizer_files(self) -> list[Path]:
        """Return the tokenizer's files; `tokenizer.json` is always among them."""
        return list_tokenizer_files(self.root)

    def chat_template(self) -> str:
        """Jinja source of the chat template."""
        return read_chat_template(self.root)

    def prompt(self, tokenizer: str) -> Prompt:
        """Return how a conversation becomes token ids.

        Args:
            tokenizer: where the bundle keeps `tokenizer.json`.
        """
        return read_prompt(
            self.root,
            tokenizer,
            int(self.config.image_token_id),
            self.text_config.eos_token_id,
            int(self.config.video_token_id) if self.kind.clips else None,
        )


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a LLaVA checkpoint and check that Foveate can export it.

    Args:
        source: a directory, which is read without touching the network, or the name of a Hugging
            Face repository such as ``llava-hf/llava-1.5-7b-hf``.
        revision: branch, tag or commit of the repository.

    Raises:
        CheckpointError: not a checkpoint, not LLaVA over a tower of the registry, pickled,
            incomplete or damaged.
    """
    root = Path(source)
    if not root.is_dir():
        root = download_checkpoint(str(source), revision)
    kind, config = _read_config(root)
    vision, text, layers = _read_parts(root / "config.json", kind, config)
    problems: list[str] = []
    weights = _collect(problems, lambda: find_weights(root, kind.parts))
    side: Any = vision.image_size
    read = read_tile_preprocessing if kind.tiled else read_preprocessing
    preprocessing = _collect(problems, lambda: read(root, side))
    given = config.image_grid_pinpoints if kind.tiled else None
    resolutions = _collect(problems, lambda: read_resolutions(root, given, side)) if given else None
    if weights is None or preprocessing is None or problems:
        raise CheckpointError(" ".join(problems))
    name = root.resolve().name if root == Path(source) else str(source)
    return Checkpoint(
        root, name, kind, config, vision, text, layers, weights, preprocessing, resolutions
    )


def _collect(problems: list[str], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _read_config(root: Path) -> tuple[CheckpointKind, Any]:
    file = root / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{root}: not a checkpoint, it has no config.json. Expected the directory that "
            "save_pretrained() writes or that a Hugging Face repository downloads to."
        )
    fields = read_json(file)
    kind = fields.get("model_type")
    if kind not in KINDS or is_original(fields):
        known = " and ".join(f"{name!r} ({one.model.__name__})" for name, one in KINDS.items())
        raise CheckpointError(
            f"{file}: model_type is {kind!r}, and Foveate exports {known}, in the transformers "
            "format. "
            "A checkpoint in LLaVA's original format is converted once: "
            f"`python -m export.convert_checkpoint {root} {root}-converted`; many are on the hub "
            "already, such as llava-hf/llava-1.5-7b-hf."
        )
    if "quantization_config" in fields:
        raise CheckpointError(
            f"{file}: the checkpoint is quantized already (quantization_config). Foveate quantizes "
            "what it exports itself: give the float16 or float32 checkpoint."
        )
    checked(ConfigFile, fields, file)
    try:
        return KINDS[kind], KINDS[kind].config.from_dict(fields)
    except Exception as error:  # transformers, given values from elsewhere
        raise CheckpointError(
            f"{file}: transformers cannot read it ({' '.join(str(error).split())}). Correct the "
            "field, or download the file again."
        ) from error


def _read_parts(
    file: Path, kind: CheckpointKind, config: Any
) -> tuple[PretrainedConfig, PretrainedConfig, tuple[int, ...]]:
    problems = []
    vision: Any = config.vision_config
    text: Any = config.text_config
    strategy = kind.select_strategy_of(config)
    layers: tuple[int, ...] = ()
    if vision.model_type not in TOWERS:
        known = ", ".join(map(repr, TOWERS))
        problems.append(f"the vision tower is {vision.model_type!r}, expected one of {known}")
    elif strategy == "default" and not has_class_token(vision):
        problems.append(
            'vision_feature_select_strategy is "default", which drops the first token, and the '
            'tower has no class token: expected "full"'
        )
    elif kind.tiled and strategy == "full" and has_class_token(vision):
        problems.append(
            'vision_feature_select_strategy is "full", and a class token has no place among the '
            'rows of tiles: expected "default"'
        )
    else:
        given, most = config.vision_feature_layer, int(vision.num_hidden_layers)
        listed = [given] if isinstance(given, int) else given
        layers = tuple(one + most + 1 if one < 0 else one for one in listed)
        if not layers or not all(1 <= one <= most for one in layers):
            problems.append(
                f"vision_feature_layer is {given} and the tower has {most} layers, expected one or "
                f"several of {-most} to -1 or 1 to {most}"
            )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problems.append(f"the language model {text.model_type!r} is not a causal language model")
    if problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}. Foveate cannot export this model.")
    return vision, text, layers


def _expected_tensors(
    checkpoint: Checkpoint, part: Part
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return name and shape of each tensor a part has, and which of them need not be stored."""
    if part is Part.NEWLINE:
        return {NEWLINE: (int(checkpoint.config.text_config.hidden_size),)}, set()
    model: Any
    with torch.device("meta"):
        if part is Part.VISION_TOWER:
            model = architecture_of(checkpoint.vision_config)(checkpoint.vision_config)
        elif part is Part.PROJECTOR:
            model = checkpoint.kind.projector(checkpoint.config)
        else:
            config = checkpoint.plain_text_config(torch.float32)
            model = causal_lm_of(config)(config)
    tied = part is Part.LANGUAGE_MODEL and bool(checkpoint.config.tie_word_embeddings)
    shapes = {
        name.removeprefix("vision_model."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    return shapes, {_HEAD} if tied else set()
