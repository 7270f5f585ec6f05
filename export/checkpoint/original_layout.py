"""LLaVA's original layout: what its names and its configuration are called in transformers.

Enters: a stored name, or the `config.json` of a checkpoint that LLaVA's own code wrote
(`llava_llama`, `model.mm_projector.*`, the tower inside or apart). Leaves: the part and the plain
name, or the fields of transformers' configuration.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from export.checkpoint.schema import Json
from export.checkpoint.weights import Part, split_name

# LLaVA's class for each language model -> transformers' name of the language model.
_FAMILIES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
_LAYERS = {"0": "linear_1", "2": "linear_2"}
"""LLaVA's projector is a list: a layer, an activation, a layer."""
_PROJECTOR = re.compile(r"^(?:model\.)?(?:mm_projector\.)?([02])\.(weight|bias)$")
_TOWER = re.compile(r"^(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)")
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
# llava-hf/llava-1.5-7b-hf: the roles of Vicuna, pictures before the words.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def is_original(fields: Json) -> bool:
    """Tell whether a `config.json` is one that LLaVA's own code wrote."""
    return "text_config" not in fields and (
        "mm_vision_tower" in fields or str(fields.get("model_type", "")).startswith("llava_")
    )


def split_original_name(stored: str) -> tuple[Part, str] | None:
    """Return the part of a tensor in the original layout, and its name in that part's model."""
    if match := _PROJECTOR.match(stored):
        return Part.PROJECTOR, f"{_LAYERS[match[1]]}.{match[2]}"
    if match := _TOWER.match(stored):
        return Part.VISION_TOWER, stored[match.end() :]
    if stored.startswith("lm_head.") or re.match(r"^model\.(embed_tokens|layers|norm)\.", stored):
        return Part.LANGUAGE_MODEL, stored
    return None


def split_any_name(stored: str) -> tuple[Part, str] | None:
    """Return the part and name of a tensor in either layout."""
    # LLaVA's tower has the words of transformers' naming in its own, so it is asked first.
    return split_original_name(stored) or split_name(stored)


def family_of(fields: Json, file: Path) -> str:
    """Return transformers' name of the language model.

    Raises:
        CheckpointError: a language model that Foveate cannot convert.
    """
    named = [str(name) for name in fields.get("architectures") or [] if name in _FAMILIES]
    kind = str(fields.get("model_type", "")).removeprefix("llava_")
    family = _FAMILIES[named[0]] if named else {"llava": "llama", "qwen": "qwen2"}.get(kind, kind)
    if family not in _FAMILIES.values():
        raise CheckpointError(
            f"{file}: model_type is {fields.get('model_type')!r}, and Foveate converts LLaVA over "
            f"{', '.join(_FAMILIES.values())}."
        )
    return family


def config_from_original(
    fields: Json, vision: Json, image_token_id: int, rows: int, file: Path
) -> Json:
    """Return transformers' configuration of an original checkpoint.

    Args:
        fields: its `config.json`.
        vision: the configuration of its vision tower.
        image_token_id: what stands for a picture.
        rows: how many rows the embedding table will have.
        file: to name in errors.

    Raises:
        CheckpointError: a projector or a language model that Foveate does not know.
    """
    if str(fields.get("mm_patch_merge_type", "flat")).startswith("spatial"):
        raise CheckpointError(
            f"{file}: LLaVA-NeXT in its original layout (mm_patch_merge_type is "
            f"{fields['mm_patch_merge_type']!r}), which Foveate does not convert. It exports "
            "transformers' layout of it: take a converted one, such as "
            "llava-hf/llava-v1.6-mistral-7b-hf."
        )
    projector = fields.get("mm_projector_type", "linear")
    strategy = fields.get("mm_vision_select_feature", "patch")
    if projector != "mlp2x_gelu" or strategy not in _STRATEGIES:
        raise CheckpointError(
            f"{file}: mm_projector_type is {projector!r} and mm_vision_select_feature "
            f"{strategy!r}; Foveate converts LLaVA-1.5's projector, 'mlp2x_gelu', over 'patch' or "
            "'cls_patch'."
        )
    left_out = ("mm_", "tune_", "freeze_", "image_", "architectures", "auto_map", "use_mm_proj")
    text: dict[str, Any] = {
        name: value for name, value in fields.items() if not name.startswith(left_out)
    }
    family = family_of(fields, file)
    text |= {"model_type": family, "vocab_size": rows}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES[strategy],
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "text_config": text,
        "vision_config": vision,
    }
