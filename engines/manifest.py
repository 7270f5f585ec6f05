"""The schema of `bundle.json`: what a bundle says about itself.

Text becomes a frozen `Manifest`, or one `BundleError` that names every problem at once. The runtime
needs nothing that is not named here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from engines.errors import BundleError
from engines.llm_words import LlmDevice
from engines.manifest_fields import (
    Deviation,
    Dtype,
    Mean,
    Record,
    RelativePath,
    Sha256,
    Side,
    TokenId,
)
from engines.picture_tiles import PictureTiles

SCHEMA_VERSION = 3
OLDEST_SCHEMA_VERSION = 1
"""Still read: it knew neither `Manifest.shared` nor graphs that serve several budgets; 2 did not
know `Manifest.tiles`."""
MOST_MANIFEST_BYTES = 8 << 20

Precision = Literal["fp32", "fp16", "int8", "mixed", "fp8"]
LlmPrecision = Literal["fp32", "int8", "int4"]
INTEGER_PRECISIONS: frozenset[str] = frozenset({"int8", "mixed"})
QUANTIZED_PRECISIONS = INTEGER_PRECISIONS | {"fp8"}
"""Those that a calibration makes: the layers that allow it are in 8 bits."""
HALF_PRECISIONS: frozenset[str] = frozenset({"fp16", "mixed", "fp8"})
"""Those whose other layers are counted as float16."""

TOKENS_AXIS = "tokens"
"""Name of the axis that the budgets of a bundle differ in."""
PATCH_INDEX_OUTPUT, ORDER_OUTPUT, WORTH_OUTPUT = "patch_index", "token_order", "token_worth"
"""Outputs of a vision graph that say how many tokens it leaves, where it ranks, their rank, and
where the squares of a picture share a budget, what each token added."""


class TensorSpec(Record):
    """One named input or output of a graph."""

    name: str
    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=0)] | str, ...] = Field(max_length=8)
    """A string is a dynamic axis, for example ``"batch"``."""


class Preprocessing(Record):
    """How a picture becomes `pixel_values`; the fields of CLIPImageProcessor plus LLaVA's padding.

    Applied in the order: RGB, pad to square, resize, centre crop, rescale, normalise.
    """

    pad_to_square: bool = False
    """LLaVA-1.5's ``image_aspect_ratio="pad"``: pad with the mean colour before resizing."""
    resize: Literal["shortest_edge", "exact", "none"] = "shortest_edge"
    resize_height: Side
    """With ``shortest_edge`` the shorter side; then `resize_width` is the same number."""
    resize_width: Side
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    center_crop: bool = True
    height: Side
    """Height of `pixel_values`."""
    width: Side
    rescale_factor: float = Field(gt=0, le=1)
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]


class ReducerSpec(Record):
    """The token reducer inside the graph."""

    name: str
    tokens: int = Field(gt=0, le=2**16)
    """N: visual tokens out of the graph, padding included."""
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)


class Graph(Record):
    """One ONNX file."""

    file: RelativePath
    weights: RelativePath | None = None
    """Where its weights lie when not in ``file``; several graphs may share them."""
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    precision: Precision
    opset: int = Field(ge=1, le=100)


class VisionGraph(Graph):
    """One budget of visual tokens.

    The file holds tower, reducer and projector; only the reducer where `Manifest.shared` holds the
    others. Budgets of a reducer that ranks name one file, the largest one's.
    """

    reducer: ReducerSpec
    patch_rows: int = Field(gt=0, le=1024)
    patch_columns: int = Field(gt=0, le=1024)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    """Share of questions answered exactly with this reducer, budget and precision, as the
    checkpoint's ``accuracy_by_budget.json`` says; None: not measured."""

    @property
    def leaves(self) -> int:
        """How many tokens the file itself leaves; more than the budget where it is a prefix."""
        shape = next((spec.shape for spec in self.outputs if spec.name == PATCH_INDEX_OUTPUT), ())
        tokens = shape[-1] if shape else self.reducer.tokens
        return tokens if isinstance(tokens, int) else self.reducer.tokens

    @property
    def is_prefix(self) -> bool:
        """Whether the budget is the first tokens, by rank, of a graph with a larger one."""
        return self.leaves > self.reducer.tokens


class SharedGraphs(Record):
    """What the vision graphs of a bundle with several of them have in common."""

    tower: Graph
    """Pixels to what the reducers read."""
    projector: Graph
    """The tokens that are left to the language model's width; their number is the axis `tokens`."""


class VisionFiles(Record):
    """The vision graphs of a bundle and what they have in common."""

    graphs: tuple[VisionGraph, ...] = Field(min_length=1)
    shared: SharedGraphs | None = None

    def stages(self, graph: VisionGraph) -> tuple[Graph, ...]:
        """Return the files that run one after the other for a budget, from pixels to tokens."""
        if self.shared is None:
            return (graph,)
        return (self.shared.tower, graph, self.shared.projector)

    @property
    def files(self) -> tuple[Graph, ...]:
        """Every file once; the first takes pixels."""
        stages = (stage for graph in self.graphs for stage in self.stages(graph))
        return tuple({stage.file: stage for stage in stages}.values())

    @property
    def token_counts(self) -> tuple[int, ...]:
        """How many tokens the files leave, the default's first."""
        return tuple(dict.fromkeys(graph.leaves for graph in self.graphs))


class LanguageModel(Record):
    """The decoder of one backend."""

    backend: str
    file: RelativePath
    precision: str
    device: LlmDevice = "cpu"
    """Where an ONNX decoder runs; llama.cpp's runs anywhere."""


class Prompt(Record):
    """How a conversation becomes token ids."""

    tokenizer: RelativePath
    chat_template: str = Field(max_length=1 << 18)
    """Jinja source, from the checkpoint."""
    image_token: str = Field(min_length=1)
    image_token_id: TokenId
    video_token: str | None = Field(default=None, min_length=1)
    """What the template writes in the place of a clip; None: it has no such place."""
    bos_token: str | None
    eos_token: str | None
    add_bos_token: bool
    stop_token_ids: tuple[TokenId, ...] = Field(min_length=1)
    max_new_tokens: int | None = Field(default=None, gt=0, le=2**27)
    """The longest answer, in tokens, where nobody asks for another; None: it is not said."""


class DecoderShape(Record):
    """Sizes of the language model, of which its memory is counted."""

    layers: int = Field(gt=0, le=2**10)
    hidden_size: int = Field(gt=0, le=2**17)
    intermediate: int = Field(gt=0, le=2**20)
    heads: int = Field(gt=0, le=2**12)
    kv_heads: int = Field(gt=0, le=2**12)
    head_size: int = Field(gt=0, le=2**12)
    vocabulary: int = Field(gt=0, le=2**24)


class Text(Record):
    """The language model's width and its embedding table, which every backend shares."""

    embeddings: RelativePath
    """safetensors with one tensor ``embed_tokens``, float16[V, D]."""
    vocabulary: int = Field(gt=0, le=2**24)
    hidden_size: int = Field(gt=0, le=2**17)
    context_length: int = Field(gt=0, le=2**27)
    decoder: DecoderShape | None = None
    """Older bundles do not say it."""


class FileRecord(Record):
    """What one file of the bundle was when the bundle was written."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class Manifest(Record):
    """Everything `bundle.json` holds."""

    schema_version: int = SCHEMA_VERSION
    model: str
    """Name of the checkpoint, for people."""
    target: str
    vision: tuple[VisionGraph, ...] = Field(min_length=1)
    """The first one is the default."""
    shared: SharedGraphs | None = None
    """Where there are several graphs, what runs before and after each of them."""
    preprocessing: Preprocessing
    """Of a picture that is one square; with ``tiles``, of the view of the whole picture."""
    tiles: PictureTiles | None = None
    """How a picture becomes several squares; None: it becomes one."""
    text: Text
    prompt: Prompt
    language_models: tuple[LanguageModel, ...] = Field(min_length=1)
    """The first one is the default."""
    versions: dict[str, str]
    """Tool -> version that built the bundle."""
    calibration_digest: Sha256 | None = None
    files: dict[RelativePath, FileRecord] = Field(default_factory=dict)
    """Every file of the bundle but `bundle.json` itself; `write_bundle` fills it in."""
    checksum: Sha256 | None = None
    """SHA-256 of all the rest of this file, see `checksum_of`; older bundles have none."""

    @property
    def vision_files(self) -> VisionFiles:
        """The vision graphs and what they have in common."""
        return VisionFiles.model_construct(graphs=self.vision, shared=self.shared)


def checksum_of(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's JSON object, its own checksum and its layout aside."""
    rest = {name: value for name, value in document.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def json_from_manifest(manifest: Manifest) -> str:
    """Write a manifest as JSON, with its checksum."""
    document = manifest.model_dump(mode="json", exclude={"checksum"})
    document["checksum"] = checksum_of(document)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def manifest_from_json(text: str | bytes, source: str) -> Manifest:
    """Read and check a manifest.

    Args:
        text: what `bundle.json` holds.
        source: the path to name in errors.

    Raises:
        BundleError: not JSON, of a newer schema, or against the schema; all problems are listed.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{source} is not JSON ({error}). It is damaged or was edited; build the bundle again "
            "with `python -m export.build`."
        ) from error
    if not isinstance(document, dict):
        raise BundleError(
            f"{source} holds a JSON {type(document).__name__}, expected an object with the fields "
            "of a bundle. Build the bundle again with `python -m export.build`."
        )
    _refuse_other_schema(document, source)
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise _schema_error(source, list_problems(error)) from None
    if problems := _reference_problems(manifest):
        raise _schema_error(source, problems)
    return manifest


def _refuse_other_schema(document: dict[str, Any], source: str) -> None:
    found = document.get("schema_version")
    if not isinstance(found, int) or isinstance(found, bool):
        return  # absent or of a wrong type: listed with the other problems
    if OLDEST_SCHEMA_VERSION <= found <= SCHEMA_VERSION:
        return
    versions = document.get("versions")
    builder = versions.get("foveate") if isinstance(versions, dict) else None
    if found > SCHEMA_VERSION:
        wanted = f"foveate {builder} or later" if builder else "a later foveate"
        install = f'pip install "foveate>={builder}"' if builder else "pip install -U foveate"
        raise BundleError(
            f"{source}: the bundle has schema version {found} and this foveate reads version "
            f"{SCHEMA_VERSION}. It was built by {wanted}: install that (`{install}`), or build the "
            "bundle again with the foveate installed here."
        )
    raise BundleError(
        f"{source}: the bundle has schema version {found} and this foveate reads version "
        f"{SCHEMA_VERSION}. Build it again with `python -m export.build`."
    )


def _reference_problems(manifest: Manifest) -> list[str]:
    """Return what is named in the manifest and is not there."""
    graphs: dict[str, Graph] = {f"vision[{at}]": one for at, one in enumerate(manifest.vision)}
    if manifest.shared is not None:
        graphs["shared.tower"] = manifest.shared.tower
        graphs["shared.projector"] = manifest.shared.projector
    named = {f"{at}.file": graph.file for at, graph in graphs.items()}
    named |= {
        f"{at}.weights": graph.weights for at, graph in graphs.items() if graph.weights is not None
    }
    named |= {
        f"language_models[{at}].file": model.file
        for at, model in enumerate(manifest.language_models)
    }
    if manifest.tiles is not None:
        named["tiles.newline"] = manifest.tiles.newline
    named["text.embeddings"] = manifest.text.embeddings
    named["prompt.tokenizer"] = manifest.prompt.tokenizer
    problems = [
        f'{field} is "{path}", which is not among "files"'
        for field, path in named.items()
        if path not in manifest.files
    ]
    sides = (manifest.preprocessing.height, manifest.preprocessing.width)
    if manifest.tiles is not None and sides != (manifest.tiles.side, manifest.tiles.side):
        problems.append(
            f"tiles.side is {manifest.tiles.side}, and preprocessing gives {sides[0]} x {sides[1]}"
        )
    if manifest.tiles is not None and manifest.tiles.picture_tokens is not None:
        problems += [
            f"tiles.picture_tokens is {manifest.tiles.picture_tokens}, and vision[{at}] does not "
            f"say what its tokens are worth ({WORTH_OUTPUT})"
            for at, graph in enumerate(manifest.vision)
            if WORTH_OUTPUT not in {spec.name for spec in graph.outputs}
        ]
    return problems + [
        f"vision[{at}].reducer.tokens is {graph.reducer.tokens} and its file leaves {graph.leaves} "
        f"without saying their order ({ORDER_OUTPUT})"
        for at, graph in enumerate(manifest.vision)
        if graph.is_prefix and ORDER_OUTPUT not in {spec.name for spec in graph.outputs}
    ]


def _schema_error(source: str, problems: list[str]) -> BundleError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return BundleError(
        f"{source} does not describe a bundle, {count}: {'; '.join(problems)}. The file was edited "
        "or damaged; build the bundle again with `python -m export.build`."
    )


def list_problems(error: ValidationError) -> list[str]:
    """Return pydantic's findings in plain words: field, what it is, what was expected."""
    # pydantic also calls a list too short when its items are wrong: that would tell it twice.
    return [
        _told(problem)
        for problem in error.errors()
        if problem["type"] != "too_short" or problem["input"] in ([], ())
    ]


def _told(problem: Any) -> str:
    """Describe one of pydantic's findings: the field, its value, what was expected."""
    field = ""
    for step in problem["loc"]:
        field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else str(step)
    field = field.removesuffix(".[key]")
    got = _shown(problem["input"])
    got = got if len(got) <= 80 else f"{got[:77]}..."
    context = problem.get("ctx", {})
    told = {
        "missing": "is missing",
        "extra_forbidden": "is not a field of this schema",
        "too_short": "is empty, expected at least one",
        "literal_error": f"is {got}, expected one of {context.get('expected')}",
        "value_error": f"{got} {context.get('error')}",
        "string_pattern_mismatch": f"is {got}, expected 64 hexadecimal digits",
    }
    expected = problem["msg"].removeprefix("Input should be ").split(", unable")[0]
    return f"{field} {told.get(problem['type'], f'is {got}, expected {expected}')}"


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return "a structure of many levels"
