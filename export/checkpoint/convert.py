"""A checkpoint in another form becomes one in transformers' layout, in safetensors.

Enters: a directory in LLaVA's original layout or in transformers', pickled or not, and the files
that change it. Leaves: a directory that `export.build` opens, whole or not at all, and what was
done in words. It goes file by file, so memory holds one of them at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import CheckpointError
from engines.staging import staged_directory
from export.checkpoint.changes import Changes, Key, read_changes, read_tensors
from export.checkpoint.download import download_checkpoint
from export.checkpoint.llava import open_checkpoint
from export.checkpoint.original_layout import (
    VICUNA_TEMPLATE,
    config_from_original,
    family_of,
    is_original,
    split_any_name,
)
from export.checkpoint.schema import IndexFile, Json, PickledIndexFile, checked, read_json
from export.checkpoint.unpickle import PICKLED
from export.checkpoint.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    Part,
    is_computed,
    stored_name,
    write_shards,
)

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WIDENED = {(Part.LANGUAGE_MODEL, _EMBEDDINGS), (Part.LANGUAGE_MODEL, _HEAD)}
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_COPIED = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json", "accuracy_by_budget.json"),
)
_CLIP_REST = re.compile(r"^(text_model|logit_scale|visual_projection|text_projection)")
"""What a whole CLIP holds beside its tower."""


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert.

    Attributes:
        source: a checkpoint's directory.
        out: directory to write.
        vision_tower: CLIP's directory or Hugging Face name, where the source has none inside; left
            out, what its configuration names.
        projector: a file whose projector comes in the place of the checkpoint's.
        lora: PEFT's directory, merged into the language model.
        chat_template: Jinja, where the source has none.
    """

    source: Path
    out: Path
    vision_tower: str | None = None
    projector: Path | None = None
    lora: Path | None = None
    chat_template: Path | None = None


def convert_checkpoint(options: ConvertOptions) -> list[str]:
    """Write the checkpoint.

    Returns:
        What was done, a line each.

    Raises:
        CheckpointError: something is missing, damaged, of another model, or cannot be converted.
    """
    source = options.source
    config_file = source / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{source}: not a checkpoint, it has no config.json.")

    def check() -> None:
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise CheckpointError(
                f"{options.out} is already there. Remove it, or choose another place."
            )

    fields = read_json(config_file)
    files = list_weight_files(source)
    size = sum(file.stat().st_size for file in files)
    with (
        staged_directory(options.out, CheckpointError, size, check) as staged,
        tempfile.TemporaryDirectory(dir=staged, prefix=".scratch-") as folder,
    ):
        scratch = Path(folder)
        changes = read_changes(options.projector, options.lora, scratch)
        renaming = _Renaming(changes)
        done: list[str] = []
        tower: list[Path] = []
        if is_original(fields):
            done, tower = _describe_original(options, fields, renaming, staged)
        else:
            shutil.copy2(config_file, staged / "config.json")
            for name in (*_COPIED, *_tokenizer_names(source)):
                if (source / name).is_file():
                    shutil.copy2(source / name, staged / name)
        read = [_named_tensors(file, scratch, _CLIP_REST) for file in tower]
        read += [_named_tensors(file, scratch) for file in files]
        write_shards(map(renaming.rename, read), staged)
        renaming.check_all_used()
        pickled = sum(file.suffix in PICKLED for file in files)
        done += [
            f"{len(renaming.made)} tensors of {len(files)} files written as safetensors"
            + (f", {pickled} of them read as pickles of tensors only" if pickled else ""),
            *changes.done,
        ]
        shutil.rmtree(scratch)
        _check_result(staged)
        scratch.mkdir()
    return done


def list_weight_files(root: Path) -> list[Path]:
    """Return the files with a checkpoint's weights; safetensors before pickles.

    Raises:
        CheckpointError: there are none, or some are missing.
    """
    names: list[str] = []
    if (root / INDEX_FILE).is_file():
        index = checked(IndexFile, read_json(root / INDEX_FILE), root / INDEX_FILE)
        names = sorted(set(index.weight_map.values()))
    elif (root / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    elif (root / _PICKLED_INDEX).is_file():
        pickles = checked(PickledIndexFile, read_json(root / _PICKLED_INDEX), root / _PICKLED_INDEX)
        names = sorted(set(pickles.weight_map.values()))
    elif (root / "pytorch_model.bin").is_file():
        names = ["pytorch_model.bin"]
    absent = [name for name in names if not (root / name).is_file()]
    if absent or not names:
        raise CheckpointError(
            f"{root}: {', '.join(absent) or 'no weights'} not found. Expected {SINGLE_FILE} or "
            "pytorch_model.bin, or shards with their index."
        )
    return [root / name for name in names]


class _Renaming:
    """Changes tensors and gives them transformers' names, file after file.

    Attributes:
        rows: rows that the embedding table is to have; None leaves it.
        filler: the row that new rows are a copy of.
        made: the names given so far.
    """

    def __init__(self, changes: Changes) -> None:
        self.rows: int | None = None
        self.filler = 0
        self.made: set[str] = set()
        self._changes = changes

    def rename(self, tensors: Iterator[tuple[Key, Tensor]]) -> dict[str, Tensor]:
        """Return one file's tensors as they are to be written.

        Raises:
            CheckpointError: a tensor was written before, or a change does not fit it.
        """
        made: dict[str, Tensor] = {}
        for key, tensor in tensors:
            changed = self._changes.apply(key, tensor)
            if key in _WIDENED and self.rows is not None and len(changed) < self.rows:
                new = changed[self.filler].expand(self.rows - len(changed), -1)
                changed = torch.cat([changed, new])
            stored = stored_name(*key)
            if stored in self.made:
                raise CheckpointError(f"The {key[0].value}'s {key[1]} is there twice.")
            self.made.add(stored)
            made[stored] = changed.contiguous()
        return made

    def check_all_used(self) -> None:
        """Check that every change found its tensor.

        Raises:
            CheckpointError: a change was for a tensor that the checkpoint has not.
        """
        wanted = {stored_name(*key) for key in (*self._changes.put, *self._changes.factors)}
        if absent := sorted(wanted - self.made):
            raise CheckpointError(
                f"The files that change the checkpoint name {len(absent)} tensors that it has not, "
                f"among them {', '.join(absent[:3])}: they are of another model."
            )


def _named_tensors(
    file: Path, scratch: Path, left_out: re.Pattern[str] | None = None
) -> Iterator[tuple[Key, Tensor]]:
    for stored, tensor in read_tensors(file, scratch).items():
        if is_computed(stored) or (left_out is not None and left_out.match(stored)):
            continue
        key = split_any_name(stored)
        if key is None:
            raise CheckpointError(f"{file}: the tensor {stored} belongs to no part of a LLaVA.")
        yield key, tensor


def _describe_original(
    options: ConvertOptions, fields: Json, renaming: _Renaming, staged: Path
) -> tuple[list[str], list[Path]]:
    """Write configuration, tokenizer, template and processor.

    Returns:
        What was done, and the files of the tower if it is apart.
    """
    source = options.source
    done = ["LLaVA's original layout renamed to transformers'"]
    tower = _find_tower(options, fields)
    vision = read_json(tower / "config.json")
    vision = vision.get("vision_config", vision) | {"model_type": "clip_vision_model"}
    token_id, length = _write_tokenizer(source, staged, renaming)
    renaming.rows = max(length, int(fields.get("vocab_size", 0)))
    config = config_from_original(fields, vision, token_id, renaming.rows, source / "config.json")
    (staged / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    done.append(f"<image> is token {token_id}; the embedding table has {renaming.rows} rows")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copy2(source / name, staged / name)
    done += _write_template(options, fields, staged)
    processor = read_json(tower / "preprocessor_config.json")
    processor |= {"do_pad": fields.get("image_aspect_ratio") == "pad"}
    (staged / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), "utf-8")
    if _holds_tower(source):
        return done, []
    return [*done, f"the vision tower of {tower} put in"], list_weight_files(tower)


def _find_tower(options: ConvertOptions, fields: Json) -> Path:
    named = options.vision_tower or fields.get("mm_vision_tower")
    if not isinstance(named, str):
        raise CheckpointError(
            f"{options.source / 'config.json'} names no vision tower. Give CLIP's directory with "
            "--vision-tower."
        )
    return Path(named) if Path(named).is_dir() else download_checkpoint(named, None)


def _holds_tower(source: Path) -> bool:
    index = next(
        (source / name for name in (INDEX_FILE, _PICKLED_INDEX) if (source / name).is_file()), None
    )
    if index is not None:
        names = list(checked(PickledIndexFile, read_json(index), index).weight_map)
    else:
        with tempfile.TemporaryDirectory() as folder:
            names = list(read_tensors(list_weight_files(source)[0], Path(folder)))
    return any((split_any_name(name) or (None,))[0] is Part.VISION_TOWER for name in names)


def _tokenizer_names(source: Path) -> list[str]:
    from export.checkpoint.processor import list_tokenizer_files

    return [file.name for file in list_tokenizer_files(source)]


def _write_tokenizer(source: Path, staged: Path, renaming: _Renaming) -> tuple[int, int]:
    """Write the tokenizer with a token for a picture; return that token's id and the vocabulary."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False, use_fast=True
        )
        known = loaded.get_vocab()
        if "<image>" not in known:
            loaded.add_special_tokens({"additional_special_tokens": ["<image>"]})
        loaded.save_pretrained(staged)
    except Exception as error:  # transformers, given files from elsewhere
        raise CheckpointError(
            f"{source}: transformers cannot load the tokenizer ({error}). Expected tokenizer.json "
            "or tokenizer.model."
        ) from error
    renaming.filler = int(loaded.unk_token_id or 0)
    return int(loaded.convert_tokens_to_ids("<image>")), len(loaded)


def _write_template(options: ConvertOptions, fields: Json, staged: Path) -> list[str]:
    given = options.chat_template
    goal = staged / "chat_template.jinja"
    if given is not None:
        shutil.copyfile(given, goal)
        return [f"the chat template of {given} taken"]
    if goal.is_file() or "chat_template" in read_json(staged / "tokenizer_config.json"):
        return []
    if family_of(fields, options.source / "config.json") != "llama":
        raise CheckpointError(
            f"{options.source}: no chat template. Give the one it was trained with: "
            "--chat-template FILE."
        )
    goal.write_text(VICUNA_TEMPLATE, "utf-8")
    return ["no chat template found: LLaVA-1.5's (Vicuna's) written; check that it was trained so"]


def _check_result(staged: Path) -> None:
    """Open what was written and compare every tensor with the configuration."""
    written = open_checkpoint(staged)
    for part in written.kind.parts:
        written.check(part)
    written.prompt("tokenizer.json")
