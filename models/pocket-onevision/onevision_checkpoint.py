"""Writing the Hugging Face checkpoint: weights in float16, configuration, tokenizer, processor.

A trained model enters; a directory that plain transformers opens leaves. transformers' processor of
this model needs torchvision for clips; where there is none, `PictureProcessor` prepares pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import paths  # noqa: F401 - makes pocket-llava's modules importable

from checkpoint import complete_json_files, write_json, write_model  # isort: skip
from onevision import PINPOINTS, TILE_PATCHES
from signs import TILE_SIZE
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from vocabulary import IMAGE, VIDEO, VIDEO_CHAT_TEMPLATE, build_tokenizer

PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)


class PictureProcessor(LlavaOnevisionProcessor):
    """transformers' processor without its half for clips, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """Let the video processor be missing."""
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(  # type: ignore[no-untyped-call]
            argument_name, argument
        )


def build_image_processor() -> LlavaOnevisionImageProcessorPil:
    """Build what cuts pictures; tiles of a picture of 192 x 192 are its own pixels."""
    return LlavaOnevisionImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE},
        resample=3,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
        image_grid_pinpoints=PINPOINTS,
    )


_SETTINGS = {
    "num_image_tokens": TILE_PATCHES,
    "vision_feature_select_strategy": "full",
    "image_token": IMAGE,
    "video_token": VIDEO,
    "vision_aspect_ratio": "anyres_max_9",
}


def open_processor(folder: Path) -> PictureProcessor:
    """Open the processor of a checkpoint where there is no torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    return PictureProcessor(  # type: ignore[no-untyped-call]
        image_processor=images, tokenizer=tokenizer, chat_template=VIDEO_CHAT_TEMPLATE, **_SETTINGS
    )


def write_checkpoint(model: LlavaOnevisionForConditionalGeneration, out: Path) -> None:
    """Write everything `from_pretrained` needs under `out`."""
    write_model(model, out)
    build_tokenizer(with_video=True).save_pretrained(out)
    images = build_image_processor()
    complete_json_files(out, images, "LlavaOnevisionImageProcessor")
    clips = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": TILE_SIZE, "width": TILE_SIZE},
        "resample": 3,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    write_json(out / "video_preprocessor_config.json", clips)
    pictures = json.loads((out / "preprocessor_config.json").read_text())
    write_json(
        out / "processor_config.json",
        {
            "processor_class": "LlavaOnevisionProcessor",
            "image_processor": pictures,
            "video_processor": clips,
            **_SETTINGS,
        },
    )
