"""One registry: a name, the network's class and its default configuration."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from pixelwise.errors import UsageError, brief
from pixelwise.machine import memory_room
from pixelwise.ops.cost import AtMost, WithoutDraws, multiply_adds

MAX_NUMBER, MAX_VALUES = 1_000_000, 256
"""No honest width, depth or count of a configuration is larger, and no list of them longer."""

MAX_TENSORS, MAX_BYTES = 10_000, 80 << 30
"""No honest network has more; of timm's largest these are about 3,000 and 17 GiB."""

MAX_USUAL = 1000  # classes or channels; the weights of more are counted too


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the registry knows of a network."""

    name: str  # what `create_model` takes
    paper: str  # authors, title, venue, year
    build: Callable[[Any], nn.Module]  # makes the network from its configuration
    config: Any  # the default configuration, a frozen dataclass with `num_classes` and `in_channels`
    tiny: Mapping[str, Any] = field(default_factory=dict)  # the fields that make it small enough for a test


_MODELS: dict[str, ModelInfo] = {}


def register_model(
    name: str, build: Callable[[Any], nn.Module], config: Any, *, paper: str, tiny: Mapping[str, Any]
) -> None:
    """Make `name` known to `create_model`.

    Args:
        name: a new one.
        build: makes the network from its configuration.
        config: the default configuration, a frozen dataclass with `num_classes` and `in_channels`.
        paper: authors, title, venue, year.
        tiny: the fields that make it small enough for a test.

    Raises:
        UsageError: the name is taken.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class PixelConfig:
        ...     num_classes: int = 2
        ...     in_channels: int = 3
        >>> def build(config):
        ...     return nn.Conv2d(config.in_channels, config.num_classes, 1)
        >>> register_model("example_pixel", build, PixelConfig(), paper="a classifier of single colours", tiny={})
        >>> tuple(create_model("example_pixel", num_classes=4)(torch.zeros(1, 3, 5, 6)).shape)
        (1, 4, 5, 6)
        >>> del _MODELS["example_pixel"]  # so that this example can run twice
    """
    if name in _MODELS:
        raise UsageError(f"a model called {name!r} is registered already ({_MODELS[name].paper}); choose another name.")
    _MODELS[name] = ModelInfo(name=name, paper=paper, build=build, config=config, tiny=dict(tiny))


def check_fields(network: str, config: Any, *positive: str) -> None:
    """Raise a UsageError for a choice that a field does not offer, a `dropout` outside [0, 1), a number below 1."""
    for key, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, key), get_args(hint) if get_origin(hint) is Literal else ()
        if choices and value not in choices:
            raise UsageError(f"{network}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}.")
        if key == "dropout" and not 0 <= value < 1:
            raise UsageError(f"{network}: dropout must be a share of at least 0 and less than 1, not {value}.")
        if key in positive and value < 1:
            raise UsageError(f"{network}: {key} must be at least 1, not {value}.")


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` takes, sorted; `pattern` may hold `*` and `?`.

    Example:
        >>> list_models("unet*")
        ['unet', 'unet_valid']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_info(name: str) -> ModelInfo:
    """What the registry knows of `name`.

    Raises:
        UsageError: no such model; the message suggests names that look alike.
    """
    if name not in _MODELS:
        raise UsageError(f"there is no model called {name!r}.{suggestion(name, _MODELS)} `pixelwise models` lists all.")
    return _MODELS[name]


def suggestion(name: str, known: Any) -> str:
    """' Did you mean a or b?' for the entries of `known` that look like `name`, or nothing."""
    alike = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(alike)}?" if alike else ""


def model_config(name: str, *, num_classes: int, in_channels: int = 3, tiny: bool = False, **config: Any) -> Any:
    """The configuration that `create_model` would build; arguments and errors as there."""
    info = model_info(name)
    known = [item.name for item in fields(info.config)]
    for key in config:
        if key not in known:
            raise UsageError(f"{name} has no option {key!r}.{suggestion(key, known)} Its options: {', '.join(known)}.")
    for key, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not _fits(value, int) or value < 1:
            raise UsageError(f"{key} must be a whole number of at least 1, not {brief(value)}.")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    for key, value in (*config.items(), ("num_classes", num_classes), ("in_channels", in_channels)):
        _check_size(f"{name}: {key}", value)
    hints = get_type_hints(type(info.config))
    for key, value in config.items():
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", "") if get_origin(hints[key]) is None else str(hints[key])
            raise UsageError(
                f"{name}: {key} must be of type {wanted}, not {brief(value)}; for example {getattr(info.config, key)!r}."
            )
    merged = {**(info.tiny if tiny else {}), **config, "num_classes": num_classes, "in_channels": in_channels}
    return replace(info.config, **merged)


def _check_size(key: str, value: Any) -> None:
    """Refuse what would take for ever to build, before anything is built."""
    if isinstance(value, tuple | list):
        if len(value) > MAX_VALUES:
            raise UsageError(f"{key} holds {len(value):,} values; at most {MAX_VALUES} are possible.")
        for item in value:
            _check_size(key, item)
    elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise UsageError(f"{key} is {brief(value)}; numbers up to {MAX_NUMBER:,} are possible.")
    elif isinstance(value, str) and len(value) > MAX_VALUES:
        raise UsageError(f"{key} has {len(value):,} characters; at most {MAX_VALUES} are possible.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the plain type that a field asks for; of literals, the network itself checks the value."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def create_model(name: str, *, num_classes: int, in_channels: int = 3, tiny: bool = False, **config: Any) -> nn.Module:
    """A network with random weights; nothing is downloaded.

    Args:
        name: one of `list_models()`.
        num_classes: score maps out (K).
        in_channels: image channels in (C).
        tiny: a version of a few thousand parameters, for tests.
        **config: fields of the network's configuration; unknown ones fail.

    Returns:
        A module whose `forward` maps images (N, C, H, W), any H, W >= 1, to logits (N, K, H, W), and whose `config`
        rebuilds it.

    Raises:
        UsageError: an unknown name or option, a value the network does not allow, or more weights than memory holds.

    Example:
        >>> model = create_model("unet", num_classes=11, widths=(8, 16, 32))
        >>> tuple(model(torch.zeros(1, 3, 37, 50)).shape)
        (1, 11, 37, 50)
    """
    made = model_config(name, num_classes=num_classes, in_channels=in_channels, tiny=tiny, **config)
    is_on_meta = torch.get_default_device().type == "meta"
    model = None
    if is_on_meta or config or max(num_classes, in_channels) > MAX_USUAL:
        model = _build_on_meta(name, made)
    if model is None or not is_on_meta:
        model = model_info(name).build(made)
    model.config, model.registered_name = made, name  # type: ignore[assignment]
    return model


def _build_on_meta(name: str, config: Any) -> nn.Module | None:
    """The network without memory and first values, None if it cannot be made so.

    Raises:
        UsageError: it has more weights than any network or memory has.
    """
    advice = "Choose smaller or fewer widths, layers and kernels."
    room = None if torch.get_default_device().type == "meta" else memory_room()
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), AtMost(MAX_TENSORS), WithoutDraws():
            model = model_info(name).build(config)
    except OverflowError as error:
        raise UsageError(f"{name}: such a network has {error}, which none needs. {advice}") from error
    except RuntimeError as error:
        if "overflow" in str(error):  # of a size in bytes
            raise UsageError(f"{name}: such a network has weights beyond any memory. {advice}") from error
        return None
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MAX_BYTES or (room is not None and size > room.bytes):
        limit = (
            f"{room}" if room is not None and room.bytes < MAX_BYTES else f"at most {MAX_BYTES >> 30} GiB are possible"
        )
        raise UsageError(f"{name}: the weights of this network take {size / 2**30:,.1f} GiB, but {limit}. {advice}")
    return model


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers in `model`."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe_model(
    name: str, *, num_classes: int = 11, in_channels: int = 3, size: tuple[int, int] = (360, 480), **config: Any
) -> dict[str, Any]:
    """Name, paper, trainable parameters, multiply-adds and coarsest stride, found without allocating the weights.

    `size` is the height and width in pixels of the image that the multiply-adds are counted for (CamVid's by default).
    """
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes, in_channels=in_channels, **config)
    return {
        "name": name,
        "paper": model_info(name).paper,
        "parameters": count_parameters(model),
        "multiply_adds": multiply_adds(model, (1, in_channels, *size)),
        "stride": model.stride,
    }
