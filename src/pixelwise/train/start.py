"""What a network starts from: random numbers, a classifier's weights, a file, or the weights of another run."""

import platform
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pixelwise.data.check import Inspection
from pixelwise.errors import UsageError
from pixelwise.infer.bundle import CARD_NAME, load_bundle
from pixelwise.models import create_model, model_config
from pixelwise.models.backbones import backbone_normalisation
from pixelwise.models.pretrained import Loaded, is_classifier, load_classifier, load_network, load_pretrained
from pixelwise.train.config import RunConfig
from pixelwise.train.inputs import check_options

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, unit scale


@dataclass(frozen=True, kw_only=True)
class Start:
    """A network as its training begins."""

    model: nn.Module  # the network, filled
    kwargs: dict[str, Any]  # what rebuilds it
    loaded: str | None  # what was loaded and what did not fit, in words, or None
    mean: tuple[float, ...]  # per channel, unit scale; the network sees (image - mean) / std
    std: tuple[float, ...]  # as `mean`


def start_network(config: RunConfig, inspection: Inspection, *, is_resumed: bool) -> Start:
    """Build the network and fill it; one that is resumed gets its weights from the checkpoint."""
    kwargs = network_config(config, inspection)
    model = create_model(config.model, **kwargs)
    check_options(config, model)
    norm: Normalisation = inspection.mean, inspection.std
    if is_resumed or not (config.init or config.pretrained):
        return Start(model=model, kwargs=kwargs, loaded=None, mean=norm[0], std=norm[1])
    if config.init and (Path(config.init) / CARD_NAME).is_file():
        loaded, norm = _start_from_run(model, Path(config.init), norm)
    else:
        loaded = _start_from_classifier(model, config)
        norm = normalisation(loaded.classifier, inspection)
    return Start(model=model, kwargs=kwargs, loaded=loaded.summary(), mean=norm[0], std=norm[1])


def network_config(config: RunConfig, inspection: Inspection) -> dict[str, Any]:
    """The keyword arguments for `create_model`: the user's, and what the data decide."""
    given = {key: value for key, value in config.options.items() if key not in ("num_classes", "in_channels")}
    fixed: dict[str, Any] = {"num_classes": inspection.folder.labels.num_classes, "in_channels": inspection.channels}
    for key, value in fixed.items():
        if config.options.get(key, value) != value:
            raise UsageError(
                f"options.{key}={config.options[key]} disagrees with the data, which have {value}. Leave it out."
            )
    made = model_config(config.model, **fixed, **given)
    return asdict(made)


def normalisation(classifier: str | None, inspection: Inspection) -> Normalisation:
    """Mean and standard deviation per channel: those of the classifier whose weights are used, else the data's own.

    A classifier's are known for 8-bit images only.
    """
    if classifier is None or set(inspection.dtypes) != {"uint8"} or inspection.channels not in (1, 3):
        return inspection.mean, inspection.std
    return _for_channels(backbone_normalisation(classifier), inspection.channels) or (inspection.mean, inspection.std)


def _start_from_classifier(model: nn.Module, config: RunConfig) -> Loaded:
    if config.init is None:
        return load_pretrained(model, config.pretrained or "auto")
    if not is_classifier(config.init):
        raise UsageError(
            f"--init {config.init}: is neither a run folder (with {CARD_NAME} and its weights) nor a classifier of timm or "
            "torchvision, such as vgg16."
        )
    return load_classifier(model, config.init)


def _start_from_run(model: nn.Module, folder: Path, norm: Normalisation) -> tuple[Loaded, Normalisation]:
    """The weights expect the normalisation they were trained with, whatever the data's own would be."""
    trained, card = load_bundle(folder)
    loaded = load_network(model, trained, f"{card.model} of {folder}")
    return loaded, _for_channels((card.mean, card.std), len(norm[0])) or norm


def _for_channels(norm: Normalisation, channels: int) -> Normalisation | None:
    """As many values as channels: for grey the average of RGB's; None where that says nothing."""
    if len(norm[0]) == channels:
        return norm
    if channels == 1 and len(norm[0]) == 3:
        return (statistics.fmean(norm[0]),), (statistics.fmean(norm[1]),)
    return None


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_line() -> list[str]:
    """What was typed, as a shell would take it."""
    return [shlex.quote(part) for part in (Path(sys.argv[0]).name, *sys.argv[1:])]
