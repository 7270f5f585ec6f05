"""Read and write bundles: directories that hold everything the runtime needs.

`write_bundle` gives an exporter a staging directory and publishes it whole or not at all;
`open_bundle` checks the manifest and every file's SHA-256 before anything is loaded from it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.digests import digests_of, kept_digests_of
from engines.errors import BundleError, OptionError
from engines.manifest import (
    MOST_MANIFEST_BYTES,
    FileRecord,
    Graph,
    LanguageModel,
    Manifest,
    Preprocessing,
    VisionGraph,
    checksum_of,
    json_from_manifest,
    manifest_from_json,
)
from engines.manifest_fields import MANIFEST_NAME
from engines.picture_tiles import ClipFrames
from engines.publishing import recover
from engines.staging import staged_directory

LOCAL_DIRECTORY = "local"
"""Where a machine may keep what it made from the bundle (TensorRT plans); not part of the bundle,
so not verified: what lies there carries its own checks."""
_SAME_FILE = {"ort": "openvino", "openvino": "ort"}
"""Backends that run each other's decoder: both read the ONNX file."""
_MOST_TOLD = 20
"""Of many files that are wrong, so many are named."""


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle.

    Attributes:
        root: the directory.
        manifest: what `bundle.json` says.
    """

    root: Path
    manifest: Manifest

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes `pixel_values`."""
        return self.manifest.preprocessing

    @property
    def local(self) -> Path:
        """Where this machine may keep what it makes from the bundle; it may not exist yet."""
        return self.root / LOCAL_DIRECTORY

    def path(self, relative: str) -> Path:
        """Return where a file of the bundle lies.

        Raises:
            BundleError: the bundle has no such file.
        """
        if relative not in self.manifest.files:
            raise BundleError(
                f'{self.root} has no file "{relative}". It has: '
                f"{', '.join(sorted(self.manifest.files))}."
            )
        return self.root / relative

    def vision(self, tokens: int | None = None) -> VisionGraph:
        """Return the graph with that many visual tokens; without a number, the first.

        Raises:
            OptionError: the bundle has no graph with that many tokens.
        """
        graphs = self.manifest.vision
        if tokens is None:
            return graphs[0]
        for graph in graphs:
            if graph.reducer.tokens == tokens:
                return graph
        held = ", ".join(str(graph.reducer.tokens) for graph in graphs)
        raise OptionError(
            f"{self.root} holds no vision graph with {tokens} visual tokens, only with {held}. Ask "
            f"for one of these, or build another with `python -m export.build --tokens {tokens}`."
        )

    def largest_vision(self) -> VisionGraph:
        """Return the graph with the most visual tokens."""
        return max(self.manifest.vision, key=self.most_visual_tokens)

    def most_visual_tokens(self, graph: VisionGraph) -> int:
        """Return how many visual tokens a picture has at most, newlines included."""
        tiles, reducer = self.manifest.tiles, graph.reducer
        if tiles is None:
            return reducer.tokens
        return tiles.most_tokens(reducer.tokens, graph.patch_rows, reducer.name)

    @property
    def most_squares(self) -> int:
        """How many squares one picture becomes at most: what one run of the graph takes."""
        return 1 if self.manifest.tiles is None else self.manifest.tiles.most_squares

    @property
    def clips(self) -> ClipFrames | None:
        """How a whole clip is seen in one place; None where it has none in the prompt."""
        tiles = self.manifest.tiles
        return None if tiles is None or self.manifest.prompt.video_token is None else tiles.clips

    @property
    def squares_of_several(self) -> bool:
        """Whether a picture is seen in another way where a conversation has several."""
        tiles = self.manifest.tiles
        return tiles is not None and tiles.several == "squares"

    def stages(self, graph: VisionGraph) -> tuple[Graph, ...]:
        """Return the files that run one after the other for a budget, from pixels to tokens."""
        return self.manifest.vision_files.stages(graph)

    def graph_bytes(self, graph: Graph) -> int:
        """Return the size of a file with its weights, which others may share."""
        names = {graph.file} | ({graph.weights} if graph.weights else set())
        return sum(self.manifest.files[name].bytes for name in names)

    def language_model(self, backend: str | None = None) -> LanguageModel:
        """Return the decoder of a backend; without a name, the first.

        Raises:
            OptionError: the bundle holds no decoder for that backend.
        """
        models = self.manifest.language_models
        if backend is None:
            return models[0]
        for name in (backend, _SAME_FILE.get(backend)):
            for model in models:
                if model.backend == name:
                    return model.model_copy(update={"backend": backend})
        held = ", ".join(model.backend for model in models)
        raise OptionError(
            f'{self.root} holds no decoder for the backend "{backend}", only for {held}. Choose '
            "one of these with --backend."
        )


def open_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Open a bundle and check that it is whole and unchanged.

    Args:
        path: the directory `export.build` wrote.
        verify: hash every file, in parallel, at a few seconds per GB; large ones that this machine
            hashed before and that did not change since are not hashed again. Without it only names
            and sizes are checked: for a path nobody else can write to.

    Raises:
        BundleError: not a bundle, of a newer schema, or files are missing, changed or added; all
            problems are listed.
    """
    root = Path(path)
    recover(root)
    text = _manifest_text(root)
    manifest = manifest_from_json(text, str(root / MANIFEST_NAME))
    problems = _file_problems(root, manifest.files)
    if verify and not problems:
        problems = _manifest_problems(manifest, text) + _digest_problems(root, manifest.files)
    if problems:
        count = "1 file" if len(problems) == 1 else f"{len(problems)} files"
        more = "; and more" if len(problems) > _MOST_TOLD else ""
        raise BundleError(
            f"{root} is not the bundle that was built, {count}: "
            f"{'; '.join(problems[:_MOST_TOLD])}{more}. Copy it "
            "again from where it was built, or build it again with `python -m export.build`."
        )
    return Bundle(root, manifest)


def _manifest_text(root: Path) -> bytes:
    if not os.path.exists(root):  # noqa: PTH110 - False too for a name that no file can have
        raise BundleError(
            f"{root} does not exist, expected a bundle directory. Build one with "
            "`python -m export.build --model DIR --out BUNDLE`."
        )
    if not root.is_dir():
        raise BundleError(f"{root} is a file, expected the bundle's directory.")
    file = root / MANIFEST_NAME
    try:
        kind = file.stat()
        if not stat.S_ISREG(kind.st_mode):
            raise BundleError(f"{file} is not a plain file. Copy the bundle again.")
        if kind.st_size > MOST_MANIFEST_BYTES:
            raise BundleError(
                f"{file} has {kind.st_size:,} bytes, expected at most {MOST_MANIFEST_BYTES:,}. It "
                "is damaged; build the bundle again with `python -m export.build`."
            )
        return file.read_bytes()
    except FileNotFoundError:
        raise BundleError(
            f"{root} holds no {MANIFEST_NAME}, so it is not a bundle (or a copy that stopped half "
            "way). Give the directory `python -m export.build --out` wrote, or copy it again."
        ) from None
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error}.") from error


def _file_problems(root: Path, files: dict[str, FileRecord]) -> list[str]:
    """Compare names and sizes with the manifest, and look for links that lead outside."""
    problems = []
    home = Path(os.path.realpath(root))  # which, unlike resolve(), does not raise at loops of links
    for name, record in sorted(files.items()):
        target = Path(os.path.realpath(root / name))
        if not target.is_relative_to(home):
            problems.append(
                f"{name} is a link to {target}, outside the bundle (copy with `cp -rL`)"
            )
        elif not target.is_file():
            problems.append(f"{name} is missing")
        elif (found := target.stat().st_size) != record.bytes:
            problems.append(f"{name} has {found:,} bytes, expected {record.bytes:,}")
    extra = sorted(set(_files_below(root)) - set(files) - {MANIFEST_NAME})
    return problems + [f"{name} was added after the build (delete it)" for name in extra]


def _manifest_problems(manifest: Manifest, text: bytes) -> list[str]:
    found = checksum_of(json.loads(text))
    if manifest.checksum in (None, found):
        return []
    return [f"{MANIFEST_NAME} was changed: its checksum is {manifest.checksum}, expected {found}"]


def _digest_problems(root: Path, files: dict[str, FileRecord]) -> list[str]:
    digests = kept_digests_of(root, files, root / LOCAL_DIRECTORY)
    return [
        f"{name} was changed: its SHA-256 is {digests[name]}, expected {record.sha256}"
        for name, record in sorted(files.items())
        if digests[name] != record.sha256
    ]


def _files_below(root: Path) -> list[str]:
    """Return every file of a directory, links included, except what this machine keeps there."""
    found = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if here == root and LOCAL_DIRECTORY in folders:
            folders.remove(LOCAL_DIRECTORY)
        linked = [name for name in folders if (here / name).is_symlink()]
        found += [(here / name).relative_to(root).as_posix() for name in [*names, *linked]]
    return found


class BundleDraft:
    """A bundle that is being written: put files under `root`, then `describe` them.

    Attributes:
        root: a directory of its own, beside where the bundle will be.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest: Manifest | None = None

    def path(self, relative: str) -> Path:
        """Return where to write a file, and make its folder."""
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def describe(self, manifest: Manifest) -> None:
        """Set the manifest; ``manifest.files`` is filled in when the block ends."""
        self.manifest = manifest


@contextmanager
def write_bundle(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    expected_bytes: int | None = None,
) -> Iterator[BundleDraft]:
    """Write a bundle completely or not at all.

    When the block ends well, every file is hashed, `README.md` and `bundle.json` are added and the
    directory is renamed into place; an old bundle stays until then. When it does not, nothing is
    left.

    Args:
        destination: the bundle's directory.
        overwrite: replace a bundle that is there. Anything else there is never replaced.
        expected_bytes: about how much will be written; too little room is refused at once.

    Raises:
        BundleError: something is in the way, the place cannot be written or the disk is full.
    """
    goal = Path(destination)

    def check() -> None:
        refuse_occupied(goal, overwrite)

    check()
    with staged_directory(goal, BundleError, expected_bytes, check) as staging:
        draft = BundleDraft(staging)
        yield draft
        if draft.manifest is None:
            raise RuntimeError("write_bundle: the block ended without draft.describe(manifest)")
        (staging / "README.md").write_text(_readme(draft.manifest), encoding="utf-8")
        names = sorted(_files_below(staging))
        files = {
            name: FileRecord(sha256=digest, bytes=(staging / name).stat().st_size)
            for name, digest in digests_of(staging, names).items()
        }
        if problems := _file_problems(staging, files):
            raise BundleError(f"{goal} was not written: {'; '.join(problems)}.")
        manifest = draft.manifest.model_copy(update={"files": files})
        text = json_from_manifest(manifest)
        manifest_from_json(text, str(goal / MANIFEST_NAME))
        (staging / MANIFEST_NAME).write_text(text, encoding="utf-8")


def refuse_occupied(goal: Path, overwrite: bool) -> None:
    """Check that a bundle may be written to ``goal``, before the work it would take.

    Raises:
        BundleError: something else lies there, or a bundle that may not be replaced.
    """
    recover(goal)
    if not goal.exists() or (goal.is_dir() and not any(goal.iterdir())):
        return
    if not (goal / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{goal} is already there and is not a bundle, so it is not replaced. Choose another "
            "place to write to."
        )
    if not overwrite:
        raise BundleError(
            f"{goal} already holds a bundle. Pass --overwrite to replace it, or choose another "
            "place to write to."
        )


def _readme(manifest: Manifest) -> str:
    """Write the README of a bundle, which says what the directory is."""
    graphs = "\n".join(
        f"- {' -> '.join(f'`{stage.file}`' for stage in manifest.vision_files.stages(graph))}: "
        f"{graph.reducer.name}, {graph.reducer.tokens} visual tokens of "
        f"{graph.patch_rows * graph.patch_columns} patches"
        f"{' of each square' if manifest.tiles is not None else ''}, {graph.precision}"
        for graph in manifest.vision
    )
    models = "\n".join(
        f"- `{model.file}`: {model.precision}, for the backend {model.backend}"
        for model in manifest.language_models
    )
    versions = ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items())
    return f"""# {manifest.model}, built for {manifest.target}

This directory is a Foveate bundle: everything that is needed to ask {manifest.model} about a
picture, without PyTorch. Ask it:

    pip install 'foveate[cpu]'
    python -m runtime.ask . picture.jpg "What is in the picture?"

The vision graph (pixels in, visual tokens out):

{graphs}

The language model:

{models}

`bundle.json` describes every file and holds its SHA-256; opening the bundle checks them, so a file
that is changed, added or missing is refused. `{LOCAL_DIRECTORY}/` may hold what a machine made from
the bundle for itself.

Built with {versions}.
"""
