"""Writing the Hugging Face checkpoint: weights in float16, configuration, tokenizer, processor.

A trained model enters; a directory that plain transformers opens leaves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from architecture import PIXEL_MEAN, PIXEL_STD
from layout import IMAGE_SIZE, PATCH_SIZE
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from vocabulary import CHAT_TEMPLATE, IMAGE, build_tokenizer


def build_processor() -> LlavaProcessor:
    """Build the processor; the resize is a no-op on the 192 x 192 pictures of the test set."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def write_checkpoint(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write everything `from_pretrained` needs under `out`."""
    write_model(model, out)
    build_processor().save_pretrained(out)
    complete_json_files(out, build_processor().image_processor, "CLIPImageProcessor")


def write_model(model: Any, out: Path) -> None:
    """Write the weights in float16, and the configurations, under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=24, do_sample=False
    )
    model.half().save_pretrained(out)
    model.float().set_attn_implementation("plain")


def complete_json_files(out: Path, image_processor: Any, class_name: str) -> None:
    """Repeat a few settings under the names that older releases and other tools look for."""
    settings = image_processor.to_dict()
    settings["image_processor_type"] = class_name
    write_json(out / "preprocessor_config.json", settings)

    config = json.loads((out / "config.json").read_text())
    config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
    write_json(out / "config.json", config)

    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(out / "tokenizer_config.json", tokenizer)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
