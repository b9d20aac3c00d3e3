"""What a run folder needs to predict with: `model.safetensors`, which holds the model card too, and nothing else.

`model.json` beside it is the card for people to read and to change. Both files may come from a stranger, so nothing in them
is believed before it is checked: no pickle, no code, and the network is built without memory, which it takes only when it
agrees with the tensors on disk.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pixelwise.data.labels import LabelSpec
from pixelwise.data.numbers import Numbers
from pixelwise.errors import DataError, brief
from pixelwise.files import atomic_path, read_json, without_nan, write_json
from pixelwise.models import create_model
from pixelwise.models.registry import MAX_NUMBER
from pixelwise.ops.cost import WithoutDraws

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "model.json"
FORMAT = 1
MAX_CARD_BYTES = 64 << 20
MAX_CHANNELS = 4096

# In the header of the weights: the card as JSON, and the hash of the file as it is with dashes in place of that hash.
_CARD_KEY, _SUM_KEY, _UNKNOWN_SUM = "card", "sha256", "-" * 64

# What building a network from values nobody checked can raise; anything else is a bug worth a traceback.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,  # PixelwiseError is one
)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known about a trained network beside its weights; the content of `model.json`.

    Attributes:
        model: The registered name, for `create_model`.
        config: Keyword arguments that rebuild the network: `create_model(model, **config)`.
        labels: Names, colours and mask values of the K classes.
        mean: Per input channel, in unit scale (uint8 / 255).
        std: As `mean`, above zero; the network sees `(unit - mean) / std`.
        data: Where it was trained (fingerprint, name of the folder, counts).
        versions: Versions of pixelwise, torch and python that trained it.
        scores: What it scored, by split.
        reading: How its images were opened (axis, intensity window, bands, slices), if not by the defaults.
        numbers: Mean, deviation, range and types of the images it was trained on; None in cards of earlier versions.
        weights_sha256: Of `model.safetensors`, 64 hex digits; filled in by `save_bundle`.
        format: Version of this layout.
    """

    model: str
    config: dict[str, Any]
    labels: LabelSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    numbers: Numbers | None = None
    weights_sha256: str = ""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values that JSON can hold."""
        values = {item.name: getattr(self, item.name) for item in fields(self)} | {"labels": self.labels.to_dict()}
        if not self.reading:
            del values["reading"]  # so that older versions read the card
        if self.numbers is None:
            del values["numbers"]
        else:
            values["numbers"] = asdict(self.numbers)
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "ModelCard":
        """The card that `to_dict` gave.

        Raises:
            DataError: a key is missing or unknown, or a value has the wrong type or is out of range.
        """
        if not isinstance(values, dict):
            raise DataError(f"a model card is a mapping, not {brief(values)}.")
        version = values.get("format")
        if version != FORMAT or isinstance(version, bool):
            text = f"this version of pixelwise reads format {FORMAT}. Update pixelwise."
            raise DataError(f"format {brief(version)} is unknown; {text}")
        older: dict[str, Any] = {"reading": {}, "numbers": None}  # what cards of earlier versions lack
        values, known = older | values, {item.name for item in fields(cls)}
        if missing := known - values.keys():
            raise DataError(f"{', '.join(sorted(missing))} missing.")
        if unknown := values.keys() - known:
            raise DataError(f"unknown keys {brief(sorted(map(str, unknown)))}.")
        for key, form, what in (
            ("model", r"\w[\w.-]{0,99}", "the name of a registered model"),
            ("weights_sha256", r"([0-9a-f]{64})?", "64 hex digits"),
        ):
            if not isinstance(values[key], str) or not re.fullmatch(form, values[key]):
                raise DataError(f"'{key}' must be {what}, not {brief(values[key])}.")
        for key in ("config", "data", "versions", "scores", "reading"):
            if not isinstance(values[key], dict) or not all(isinstance(name, str) for name in values[key]):
                raise DataError(f"'{key}' must be a mapping, not {brief(values[key])}.")
        for key, most in (("config", MAX_NUMBER), ("reading", 1e30)):
            values[key] = {name: _config_value(name, value, most) for name, value in values[key].items()}
        files = values["reading"].get("channel_files", 1)
        if not isinstance(files, int) or isinstance(files, bool) or not 1 <= files <= MAX_CHANNELS:
            raise DataError(f"reading channel_files must be 1 to {MAX_CHANNELS:,}, not {brief(files)}.")
        for key in ("mean", "std"):
            values[key] = _numbers(key, values[key])
        numbers = None if values["numbers"] is None else _numbers_of(values["numbers"], len(values["mean"]))
        card = cls(**values | {"labels": LabelSpec.from_dict(values["labels"]), "numbers": numbers})
        # What the card says twice must agree, or predictions would be wrong without notice.
        if len(card.mean) != len(card.std):
            raise DataError(f"'mean' has {len(card.mean)} channels, but 'std' has {len(card.std)}.")
        if any(value <= 0 for value in card.std):
            raise DataError(f"'std' must be above zero, not {brief(card.std)}.")
        for key, expected in (("num_classes", len(card.labels.names)), ("in_channels", len(card.mean))):
            if card.config.get(key) != expected:
                raise DataError(f"config {key} is {brief(card.config.get(key))}, but the card describes {expected}.")
        return card


def save_bundle(folder: str | Path, model: nn.Module, card: ModelCard) -> ModelCard:
    """Write `model.safetensors`, which holds the card too, then `model.json`; returns the card with the hash of the weights.

    The first takes its name in one step, so a kill at any moment leaves a network with its own card. `model.json` is the
    card for people and other programs; where it does not name the hash of the weights, it is that of others.
    """
    folder = Path(folder)
    # Clones: safetensors refuses tensors that share memory or are strided (channels_last).
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    inside = json.dumps(without_nan(replace(card, weights_sha256="").to_dict()))
    with atomic_path(folder / WEIGHTS_NAME) as part:
        safetensors.torch.save_file(state, part, metadata={_CARD_KEY: inside, _SUM_KEY: _UNKNOWN_SUM})
        digest = _digest(part)  # of the file that does not know it yet
        with part.open("rb+") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            file.seek(8)
            file.write(header.replace(_UNKNOWN_SUM.encode(), digest.encode(), 1))
        card = replace(card, weights_sha256=_digest(part))
    write_json(folder / CARD_NAME, card.to_dict())
    return card


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder looks like one that holds a trained network."""
    return any((Path(folder) / name).is_file() for name in (WEIGHTS_NAME, CARD_NAME))


def load_bundle(folder: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, ModelCard]:
    """The trained network (in eval mode, on `device`, without gradients) and its card.

    The global random state is left as it was.

    Raises:
        DataError: a file is missing, damaged, does not belong to the other, or describes something impossible.
    """
    folder = Path(folder)
    content = _read_weights(folder)
    card, source = _card_of(folder, content)
    path = folder / WEIGHTS_NAME
    state = _parsed(path, content)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = _build(card, source)
        state = _checked(state, model.state_dict(), path)
        model.load_state_dict(state, assign=True)
        if not _is_whole(model):
            with WithoutDraws():
                model = _build(card, source)
            model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False), card


def load_card(folder: str | Path) -> ModelCard:
    """The card of the run in `folder`.

    Raises:
        DataError: there is none, or it is not one that this version understands.
    """
    return _card_of(Path(folder), _read_weights(Path(folder)))[0]


def _card_of(folder: Path, content: bytes) -> tuple[ModelCard, Path]:
    """The card of the weights with this `content` and the file it is from: `model.json` if it names them, else their own."""
    path, digest = folder / CARD_NAME, hashlib.sha256(content).hexdigest()
    beside = _read_card(path) if path.is_file() else None
    if beside is not None and beside.weights_sha256 == digest:
        return beside, path
    weights = folder / WEIGHTS_NAME
    if (inside := _inside(weights, content)) is not None:
        return replace(inside, weights_sha256=digest), weights
    if beside is None:
        raise DataError(f"{folder}: holds no {CARD_NAME}. Give the run folder that `pixelwise train` wrote.")
    raise DataError(
        f"{weights}: is not what {CARD_NAME} describes (another sha256): the file is damaged, or the two "
        "files come from different moments of a run. Copy both again, or resume the training."
    )


def _inside(path: Path, content: bytes) -> ModelCard | None:
    """The card that the weights hold; None if they hold none (earlier versions) or are damaged."""
    end = 8 + min(int.from_bytes(content[:8], "little"), MAX_CARD_BYTES)
    try:
        header = json.loads(content[8:end])["__metadata__"]
        inside, digest = header[_CARD_KEY], header[_SUM_KEY]
        whole = hashlib.sha256(content[:end].replace(digest.encode(), _UNKNOWN_SUM.encode(), 1))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    whole.update(memoryview(content)[end:])
    return _parsed_card(path, json.loads(inside)) if whole.hexdigest() == digest else None


def _read_card(path: Path) -> ModelCard:
    if path.stat().st_size > MAX_CARD_BYTES:
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes is too large for a model card (at most {MAX_CARD_BYTES:,})."
        )
    card = _parsed_card(path, read_json(path))
    if not card.weights_sha256:
        raise DataError(f"{path}: 'weights_sha256' is empty.")
    return card


def _parsed_card(path: Path, values: Any) -> ModelCard:
    try:
        return ModelCard.from_dict(values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_weights(folder: Path) -> bytes:
    path = folder / WEIGHTS_NAME
    if not is_bundle(folder):
        what = "is not a folder" if not folder.is_dir() else f"holds no {CARD_NAME}"
        raise DataError(f"{folder}: {what}. Give the run folder that `pixelwise train` wrote.")
    if not path.is_file():  # a pipe would be read for ever
        raise DataError(f"{path}: there is no such file. A run needs {CARD_NAME} and {WEIGHTS_NAME}; copy both.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _parsed(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: is not a safetensors file ({brief(error)}).") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors on disk, if they are those of the network by name, shape and kind, and are finite; in its types."""
    for what, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            raise DataError(f"{path}: {what} {len(names):,} tensors of the network, such as {brief(min(names))}.")
    for name, want in expected.items():
        have = state[name]
        if have.shape != want.shape or have.is_floating_point() != want.is_floating_point() or have.is_complex():
            raise DataError(
                f"{path}: tensor {name} is {have.dtype} {tuple(have.shape)}, but the network of {CARD_NAME} has "
                f"{want.dtype} {tuple(want.shape)}."
            )
        # The least and the largest value are NaN where one is: one pass, a fifth of the time of looking at each.
        if have.is_floating_point() and have.numel() and not all(map(torch.isfinite, torch.aminmax(have.float()))):
            raise DataError(
                f"{path}: tensor {name} holds NaN or infinite values; this network cannot predict. Train it again."
            )
    return {name: state[name].to(want.dtype) for name, want in expected.items()}


def _is_whole(model: nn.Module) -> bool:
    """Whether no tensor is without memory, as those are that are not among the weights."""
    values = (value for module in model.modules() for value in (*module.buffers(recurse=False), *vars(module).values()))
    return not any(isinstance(value, Tensor) and value.is_meta for value in values)


def _build(card: ModelCard, path: Path) -> nn.Module:
    try:
        return create_model(card.model, **card.config)
    except _BUILD_ERRORS as error:
        raise DataError(f"{path}: model {card.model} cannot be built from this config: {brief(error, 400)}") from error


def _numbers_of(values: Any, bands: int) -> Numbers:
    """What the card says of the images of the training."""
    known = {item.name for item in fields(Numbers)}
    if not isinstance(values, dict) or values.keys() != known:
        raise DataError(f"'numbers' must be a mapping of {', '.join(sorted(known))}, not {brief(values)}.")
    names = values["dtypes"]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and len(name) <= 20 for name in names):
        raise DataError(f"'numbers' dtypes must list names of number types, not {brief(names)}.")
    found = {key: _numbers(f"numbers {key}", values[key]) for key in ("mean", "std", "low", "high")}
    if any(len(item) != bands for item in found.values()) or any(value <= 0 for value in found["std"]):
        raise DataError(f"'numbers' must have {bands} numbers of each kind, and 'std' above zero.")
    return Numbers(**found, dtypes=tuple(names))


def _numbers(key: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_CHANNELS:
        raise DataError(f"'{key}' must list one number for each channel, not {brief(values)}.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise DataError(f"'{key}' must hold finite numbers, not {brief(value)}.")
    return tuple(float(value) for value in values)


def _config_value(key: str, value: Any, most: float, depth: int = 0) -> Any:
    """A value that a config may hold: a number of sensible size, a plain name, or a list of such; lists become tuples.

    Names such as `torchvision/resnet50` pass, paths and addresses do not (timm would download `hf-hub:…`).
    """
    if isinstance(value, list | tuple) and depth < 3 and len(value) <= MAX_CHANNELS:
        return tuple(_config_value(key, item, most, depth + 1) for item in value)
    is_number = isinstance(value, int | float) and abs(value) <= most
    is_name = isinstance(value, str) and len(value) <= 100 and re.fullmatch(r"(\w[\w.+-]*/)?\w[\w.+-]*|", value)
    if value is None or is_number or is_name:
        return value
    allowed = f"numbers up to {most:,.12g}, plain names and lists of them"
    raise DataError(f"config {brief(key)} cannot be {brief(value)}; allowed are {allowed}.")
