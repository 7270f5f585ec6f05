"""Read the checkpoint's processor files into the bundle's `Preprocessing` and `Prompt`.

With them the runtime needs neither transformers nor the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from engines.errors import CheckpointError
from engines.manifest import Preprocessing, Prompt

Json = dict[str, Any]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

# The image processors whose steps are exactly those of `Preprocessing`.
_KNOWN_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
# PIL.Image.Resampling, by number.
_RESAMPLING: tuple[Resample, ...] = (
    "nearest",
    "lanczos",
    "bilinear",
    "bicubic",
    "box",
    "hamming",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def read_json(file: Path) -> Json:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not readable JSON ({error}). Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, got {type(content).__name__}. "
            "Download the file again."
        )
    return content


def read_preprocessing(root: Path, image_size: int) -> Preprocessing:
    """Return how a picture becomes the tower's `pixel_values`.

    Args:
        root: the checkpoint's directory, with `preprocessor_config.json` or, as newer releases
            write it, `processor_config.json` with an `image_processor` in it.
        image_size: side of the square the tower takes, in pixels.

    Raises:
        CheckpointError: no image processor, an unknown one, or one that gives another size.
    """
    file, fields = _find_image_processor(root)
    kind = str(fields.get("image_processor_type", fields.get("feature_extractor_type", "")))
    if kind and not kind.startswith(_KNOWN_PROCESSORS):
        raise CheckpointError(
            f"{file}: image processor {kind!r} is not one Foveate can reproduce exactly. "
            f"Expected one of {', '.join(_KNOWN_PROCESSORS)}."
        )
    problems: list[str] = []
    resize, (resize_height, resize_width) = _read_resize(fields, image_size, problems)
    crops = bool(fields.get("do_center_crop", True))
    height, width = (
        _read_sides(fields.get("crop_size", image_size), "crop_size", problems)
        if crops
        else (resize_height, resize_width)
    )
    if not crops and resize == "shortest_edge":
        problems.append("do_center_crop is false, so pictures keep their own shape")
    if (height, width) != (image_size, image_size):
        problems.append(
            f"it gives {height}x{width} pixels, and the vision tower takes "
            f"{image_size}x{image_size}"
        )
    resample = fields.get("resample", 3)
    if not isinstance(resample, int) or not 0 <= resample < len(_RESAMPLING):
        problems.append(f"resample is {resample!r}, not one of 0 to {len(_RESAMPLING) - 1}")
    mean, std = _read_statistics(fields, problems)
    if problems:
        raise CheckpointError(
            f"{file}: {'; '.join(problems)}. Correct the file, or take it from the checkpoint's "
            "publisher again."
        )
    return Preprocessing(
        pad_to_square=bool(fields.get("do_pad", False)),
        resize=resize,
        resize_height=resize_height,
        resize_width=resize_width,
        resample=_RESAMPLING[resample],
        center_crop=crops,
        height=height,
        width=width,
        rescale_factor=float(fields.get("rescale_factor", 1 / 255))
        if fields.get("do_rescale", True)
        else 1.0,
        mean=mean,
        std=std,
    )


def read_chat_template(root: Path) -> str:
    """Return the Jinja source of the checkpoint's chat template.

    Raises:
        CheckpointError: there is none.
    """
    jinja = root / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = root / name
        template = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # several named templates
            template = {str(t.get("name")): t.get("template") for t in template}.get("default")
        if isinstance(template, str):
            return template
    raise CheckpointError(
        f"{root}: no chat template. Looked for chat_template.jinja, chat_template.json and "
        '"chat_template" in processor_config.json and tokenizer_config.json. Write the template '
        "the model was trained with to chat_template.jinja."
    )


def list_tokenizer_files(root: Path) -> list[Path]:
    """Return the tokenizer's files; `tokenizer.json` is always among them.

    Raises:
        CheckpointError: there is no `tokenizer.json`.
    """
    if not (root / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{root}: no tokenizer.json. The runtime reads only that file. Write it with: "
            f'python -c "from transformers import AutoTokenizer as T; '
            f'T.from_pretrained({str(root)!r}).save_pretrained({str(root)!r})"'
        )
    return [root / name for name in _TOKENIZER_FILES if (root / name).is_file()]


def read_prompt(
    root: Path, tokenizer: str, image_token_id: int, text_eos: int | list[int] | None
) -> Prompt:
    """Return how a conversation becomes token ids.

    Args:
        root: the checkpoint's directory.
        tokenizer: where the bundle keeps `tokenizer.json`.
        image_token_id: from the checkpoint's configuration.
        text_eos: end-of-sequence ids of the language model's configuration.

    Raises:
        CheckpointError: no tokenizer, no chat template, or an image token it does not know.
    """
    from transformers import AutoTokenizer

    list_tokenizer_files(root)
    template = read_chat_template(root)
    loaded = AutoTokenizer.from_pretrained(root)
    image_token = loaded.convert_ids_to_tokens(image_token_id)
    if not isinstance(image_token, str):
        raise CheckpointError(
            f"{root}: config.json says the image token has id {image_token_id}, and the tokenizer "
            f"knows no such id (it has {len(loaded)}). Correct image_token_index in config.json, "
            "or add the token to the tokenizer."
        )
    generation = root / "generation_config.json"
    stops = [
        *_as_ids(read_json(generation).get("eos_token_id") if generation.is_file() else None),
        *_as_ids(text_eos),
        *_as_ids(loaded.eos_token_id),
    ]
    # What transformers itself puts before an empty text, whichever file told it to.
    adds_bos = loaded.bos_token_id is not None and loaded("").input_ids[:1] == [loaded.bos_token_id]
    return Prompt(
        tokenizer=tokenizer,
        chat_template=template,
        image_token=image_token,
        image_token_id=image_token_id,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        add_bos_token=adds_bos,
        stop_token_ids=tuple(dict.fromkeys(stops)),
    )


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _find_image_processor(root: Path) -> tuple[Path, Json]:
    nested = root / "processor_config.json"
    if nested.is_file():
        fields = read_json(nested).get("image_processor")
        if isinstance(fields, dict):
            return nested, fields
    flat = root / "preprocessor_config.json"
    if flat.is_file():
        return flat, read_json(flat)
    raise CheckpointError(
        f"{root}: no image processor. Expected preprocessor_config.json, or processor_config.json "
        "with an image_processor in it. Download it from where the weights came from."
    )


def _read_resize(
    fields: Json, image_size: int, problems: list[str]
) -> tuple[Literal["shortest_edge", "exact", "none"], tuple[int, int]]:
    if not fields.get("do_resize", True):
        return "none", (image_size, image_size)
    size = fields.get("size", image_size)
    if isinstance(size, int):  # the oldest files; CLIP reads it as the shortest edge
        size = {"shortest_edge": size}
    if isinstance(size, dict) and isinstance(size.get("shortest_edge"), int):
        return "shortest_edge", (size["shortest_edge"], size["shortest_edge"])
    return "exact", _read_sides(size, "size", problems)


def _read_sides(value: object, field: str, problems: list[str]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict):
        height, width = value.get("height"), value.get("width")
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    problems.append(f"{field} is {value!r}, not a number nor a height and a width")
    return 0, 0


def _read_statistics(
    fields: Json, problems: list[str]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if not fields.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    statistics = []
    for field in ("image_mean", "image_std"):
        value = fields.get(field)
        if isinstance(value, list) and len(value) == 3:
            statistics.append((float(value[0]), float(value[1]), float(value[2])))
        else:
            problems.append(f"{field} is {value!r}, not three numbers")
            statistics.append((1.0, 1.0, 1.0))
    return statistics[0], statistics[1]
