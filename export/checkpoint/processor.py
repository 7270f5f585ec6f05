"""Read the checkpoint's processor files into the bundle's `Preprocessing` and `Prompt`.

With them the runtime needs neither transformers nor the checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from engines.errors import CheckpointError, FoveateError, OptionError
from engines.manifest import Preprocessing, Prompt, list_problems
from engines.picture_tiles import NEWLINE, PictureTiles, Resolution
from export.checkpoint.schema import (
    GenerationFile,
    ImageProcessorFile,
    Json,
    Size,
    checked,
    read_json,
    read_text,
)
from runtime.language.prompt import PromptWriter, Turn
from runtime.language.tokenizer_file import open_tokenizer, without_panic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

# The image processors whose steps are exactly those of `Preprocessing`.
_KNOWN_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPFeatureExtractor",
    "LlavaImageProcessor",
    "SiglipImageProcessor",
)
# Those whose tiles the layout `llava_next` cuts.
_TILE_PROCESSORS = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
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


def read_preprocessing(
    root: Path, image_size: int, known: Sequence[str] = _KNOWN_PROCESSORS
) -> Preprocessing:
    """Return how a picture becomes the tower's `pixel_values`.

    Args:
        root: the checkpoint's directory, with `preprocessor_config.json` or, as newer releases
            write it, `processor_config.json` with an `image_processor` in it.
        image_size: side of the square the tower takes, in pixels.
        known: image processors that are taken.

    Raises:
        CheckpointError: no image processor, an unknown one, or one that gives another size.
    """
    file, raw = _find_image_processor(root)
    fields = checked(ImageProcessorFile, raw, file)
    kind = fields.image_processor_type or fields.feature_extractor_type
    if kind and not kind.startswith(tuple(known)):
        raise CheckpointError(
            f"{file}: image processor {kind!r} is not one Foveate can reproduce exactly. "
            f"Expected one of {', '.join(known)}."
        )
    return preprocessing_of(file, fields, image_size)


def preprocessing_of(file: Path, fields: ImageProcessorFile, image_size: int) -> Preprocessing:
    """Return how a picture becomes the tower's `pixel_values`, as the fields of a file say.

    Args:
        file: where they stand.
        fields: of an image processor, or of a video processor.
        image_size: side of the square the tower takes, in pixels.

    Raises:
        CheckpointError: it cannot be told, or gives another size.
    """
    problems: list[str] = []
    resize, (resize_height, resize_width) = _read_resize(fields, image_size, problems)
    height, width = (
        _read_sides(fields.crop_size or image_size, "crop_size", problems)
        if fields.do_center_crop
        else (resize_height, resize_width)
    )
    if not fields.do_center_crop and resize == "shortest_edge":
        problems.append("do_center_crop is false, so pictures keep their own shape")
    if (height, width) != (image_size, image_size):
        problems.append(
            f"it gives {height}x{width} pixels, and the vision tower takes "
            f"{image_size}x{image_size}"
        )
    if not 0 <= fields.resample < len(_RESAMPLING):
        problems.append(f"resample is {fields.resample}, not one of 0 to {len(_RESAMPLING) - 1}")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if fields.do_normalize and fields.image_mean and fields.image_std:
        mean, std = fields.image_mean, fields.image_std
    elif fields.do_normalize:
        problems.append("image_mean or image_std is missing, expected three numbers each")
    if problems:
        raise CheckpointError(
            f"{file}: {'; '.join(problems)}. Correct the file, or take it from the checkpoint's "
            "publisher again."
        )
    return Preprocessing(
        pad_to_square=fields.do_pad,
        resize=resize,
        resize_height=resize_height,
        resize_width=resize_width,
        resample=_RESAMPLING[fields.resample],
        center_crop=fields.do_center_crop,
        height=height,
        width=width,
        rescale_factor=fields.rescale_factor if fields.do_rescale else 1.0,
        mean=mean,
        std=std,
    )


def read_tile_preprocessing(root: Path, image_size: int) -> Preprocessing:
    """Return how the whole view of a picture that is cut into tiles becomes `pixel_values`.

    It is squeezed into the square. A tile has the square's size already.

    Args:
        root: the checkpoint's directory.
        image_size: side of the square the tower takes, in pixels.

    Raises:
        CheckpointError: as `read_preprocessing`, which reads the rest of the same file.
    """
    whole = read_preprocessing(root, image_size, _TILE_PROCESSORS)
    if (whole.resize_height, whole.resize_width) != (image_size, image_size):
        raise CheckpointError(
            f"{root}: the image processor scales the whole picture to {whole.resize_height}x"
            f"{whole.resize_width}, and the vision tower takes {image_size}x{image_size}. Take the "
            "file from the checkpoint's publisher again."
        )
    # Its do_pad is about batches: pictures with fewer tiles get black ones.
    return whole.model_copy(
        update={"resize": "exact", "center_crop": False, "pad_to_square": False}
    )


def read_resolutions(
    root: Path, configured: Sequence[Sequence[int]], image_size: int
) -> tuple[Resolution, ...]:
    """Return what a picture may be scaled into before it is cut into tiles, in pixels.

    Args:
        root: the checkpoint's directory.
        configured: `image_grid_pinpoints` of `config.json`, after which the language model's
            tokens are counted.
        image_size: side of a tile.

    Raises:
        CheckpointError: the image processor has others, or one that no whole tiles fill.
    """
    file, raw = _find_image_processor(root)
    resolutions = tuple((int(height), int(width)) for height, width in configured)
    own = checked(ImageProcessorFile, raw, file).image_grid_pinpoints
    if own is not None and tuple(own) != resolutions:
        raise CheckpointError(
            f"{file}: image_grid_pinpoints is {own}, and config.json says {list(resolutions)}. "
            "They must be the same: take both files from the checkpoint's publisher again."
        )
    try:
        PictureTiles(side=image_size, resolutions=resolutions, newline=NEWLINE)
    except ValidationError as error:
        raise CheckpointError(
            f"{root / 'config.json'}: image_grid_pinpoints: {'; '.join(list_problems(error))}. "
            "Correct the file, or take it from the checkpoint's publisher again."
        ) from error
    return resolutions


def read_chat_template(root: Path) -> str:
    """Return the Jinja source of the checkpoint's chat template.

    Raises:
        CheckpointError: there is none.
    """
    jinja = root / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = root / name
        template = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # several named templates
            named = [one for one in template if isinstance(one, dict)]
            template = {str(t.get("name")): t.get("template") for t in named}.get("default")
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


def load_tokenizer(root: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer as transformers sets it up, without running code of the checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    list_tokenizer_files(root)
    open_tokenizer(root / "tokenizer.json", CheckpointError)

    def load() -> PreTrainedTokenizerBase:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            root, local_files_only=True, trust_remote_code=False
        )
        loaded("")  # what its configuration names is looked up here
        return loaded

    return without_panic(load, lambda problem: _damaged_tokenizer(root, problem))


def _damaged_tokenizer(root: Path, problem: BaseException) -> CheckpointError:
    said = " ".join(str(problem).split())[:300]
    return CheckpointError(
        f"{root}: transformers cannot load the tokenizer ({type(problem).__name__}: {said}). "
        "Download tokenizer.json, tokenizer_config.json and special_tokens_map.json again."
    )


def read_prompt(
    root: Path,
    tokenizer: str,
    image_token_id: int,
    text_eos: object,
    video_token_id: int | None = None,
) -> Prompt:
    """Return how a conversation becomes token ids, tried with a question about a picture.

    Args:
        root: the checkpoint's directory.
        tokenizer: where the bundle keeps `tokenizer.json`.
        image_token_id: from the checkpoint's configuration.
        text_eos: end-of-sequence ids of the language model's configuration.
        video_token_id: likewise, of checkpoints that take clips. It is left out of what is returned
            where the chat template has no place for a clip.

    Raises:
        CheckpointError: no tokenizer, no chat template, one that cannot ask about a picture, an
            image token the tokenizer does not know, or nothing that ends an answer.
    """
    template = read_chat_template(root)
    loaded: Any = load_tokenizer(root)
    image_token = without_panic(
        lambda: loaded.convert_ids_to_tokens(image_token_id),
        lambda problem: _damaged_tokenizer(root, problem),
    )
    if not isinstance(image_token, str):
        raise CheckpointError(
            f"{root}: config.json says the image token has id {image_token_id}, and the tokenizer "
            f"knows no such id (it has {len(loaded)}). Correct image_token_index in config.json, "
            "or add the token to the tokenizer."
        )
    generation = root / "generation_config.json"
    written = read_json(generation) if generation.is_file() else {}
    generated = checked(GenerationFile, written, generation)
    own = {"eos_token_id": loaded.eos_token_id}
    stops = [
        *generated.eos_token_id,
        *checked(GenerationFile, {"eos_token_id": text_eos}, root / "config.json").eos_token_id,
        *checked(GenerationFile, own, root / "tokenizer_config.json").eos_token_id,
    ]
    # What transformers itself puts before an empty text, whichever file told it to.
    adds_bos = loaded.bos_token_id is not None and loaded("").input_ids[:1] == [loaded.bos_token_id]
    try:
        prompt = Prompt(
            tokenizer=tokenizer,
            chat_template=template,
            image_token=image_token,
            image_token_id=image_token_id,
            bos_token=loaded.bos_token,
            eos_token=loaded.eos_token,
            add_bos_token=adds_bos,
            stop_token_ids=tuple(dict.fromkeys(stops)),
            max_new_tokens=generated.max_new_tokens,
        )
    except ValidationError as error:
        raise CheckpointError(
            f"{root}: a prompt cannot be written as its files say: "
            f"{'; '.join(list_problems(error))}. An answer needs a token that ends it "
            "(eos_token_id in generation_config.json)."
        ) from error
    if video_token_id is not None:
        token = loaded.convert_ids_to_tokens(video_token_id)
        prompt = prompt.model_copy(update={"video_token": token})
    return _try_prompt(root, prompt, loaded)


def _try_prompt(root: Path, prompt: Prompt, loaded: Any) -> Prompt:
    """Ask about a picture, so that a bundle that cannot is never built, and about a clip.

    Returns:
        The prompt, without a clip's token where the template has no place for it.

    Raises:
        CheckpointError: template or tokenizer refuse a picture.
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded.backend_tokenizer.save(str(Path(folder, "tokenizer.json")))
        tried = prompt.model_copy(update={"tokenizer": "tokenizer.json"})
        try:
            writer = PromptWriter.from_prompt(tried, Path(folder, "tokenizer_config.json"))
            writer.ids([Turn("user", "What is in the picture?", images=1)])
        except FoveateError as error:
            raise CheckpointError(
                f"{root}: a question about a picture cannot be written with its chat template and "
                f"tokenizer. {str(error).replace(folder, str(root))}"
            ) from error
        try:
            writer.ids([Turn("user", "What happened?", clips=1)])
        except OptionError:
            return prompt.model_copy(update={"video_token": None})
    return prompt


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
    fields: ImageProcessorFile, image_size: int, problems: list[str]
) -> tuple[Literal["shortest_edge", "exact", "none"], tuple[int, int]]:
    if not fields.do_resize:
        return "none", (image_size, image_size)
    size = fields.size or image_size
    if isinstance(size, int):  # the oldest files; CLIP reads it as the shortest edge
        return "shortest_edge", (size, size)
    if size.shortest_edge is not None:
        return "shortest_edge", (size.shortest_edge, size.shortest_edge)
    return "exact", _read_sides(size, "size", problems)


def _read_sides(value: int | Size, field: str, problems: list[str]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if value.height is not None and value.width is not None:
        return value.height, value.width
    problems.append(f"{field} is neither a number nor a height and a width")
    return 0, 0
