"""Download a checkpoint from Hugging Face, only the files that Foveate reads."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engines.errors import CheckpointError

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


def download_checkpoint(name: str, revision: str | None) -> Path:
    """Download the files of a Hugging Face repository that Foveate reads.

    Raises:
        CheckpointError: not a repository's name, or it cannot be reached.
    """
    if not _HUB_NAME.match(name):
        raise CheckpointError(
            f"{name}: no such directory, and not the name of a Hugging Face repository either "
            "(owner/name). Give the checkpoint's directory."
        )
    try:
        root = snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such directory, and it cannot be downloaded from Hugging Face either "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, the network "
            "and, for a gated repository, `hf auth login`; or download it elsewhere and give the "
            "directory."
        ) from error
    return Path(root)
