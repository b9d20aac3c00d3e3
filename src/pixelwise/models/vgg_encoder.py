"""The thirteen convolutions of VGG-16 with batch norm: the encoder that SegNet and DeconvNet share, and its weights.

Paper:  Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015
        (arXiv:1409.1556), configuration D.
Differs from the paper: a batch norm follows each convolution, as in SegNet (arXiv:1511.00561) and DeconvNet
        (arXiv:1505.04366); the poolings stand with the networks, which keep their indices.
Shapes: N batch, C channels, H W image size.
"""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.backbones import adapt_first_conv

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)  # convolutions in each stage


def check_widths(network: str, widths: tuple[int, ...]) -> None:
    """Raises `UsageError` unless there is a positive width for each of the five stages."""
    if len(widths) != len(DEPTHS) or min(widths) < 1:
        raise UsageError(f"{network}: widths must be {len(DEPTHS)} positive numbers, not {widths}.")


def vgg_encoder(in_channels: int, widths: tuple[int, ...]) -> nn.ModuleList:
    """Five stages of 3x3 convolutions, each with batch norm and ReLU, named conv1_1, bn1_1, relu1_1, ..., relu5_3."""
    stages = nn.ModuleList()
    for stage, (before, width) in enumerate(pairwise((in_channels, *widths)), start=1):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, DEPTHS[stage - 1] + 1):
            layers[f"conv{stage}_{index}"] = nn.Conv2d(before if index == 1 else width, width, 3, padding=1)
            layers[f"bn{stage}_{index}"] = nn.BatchNorm2d(width)
            layers[f"relu{stage}_{index}"] = nn.ReLU(inplace=True)
        stages.append(nn.Sequential(layers))
    return stages


def encoder_weights(network: str, encoder: nn.ModuleList, classifier: nn.Module) -> dict[str, Tensor]:
    """Entries of a network's state for its `encoder`, from the convolutions and norms of torchvision's vgg16_bn or vgg16.

    Raises:
        UsageError: another architecture, or other widths.
    """
    given = _trunk(network, classifier)
    weights: dict[str, Tensor] = {}
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        own = [(path, layer) for path, layer in encoder.named_modules() if isinstance(layer, kind)]
        theirs = [layer for layer in given if isinstance(layer, kind)]
        for (path, layer), source in zip(own, theirs, strict=False):  # a plain VGG-16 has no norms
            for key, tensor in source.state_dict().items():
                if path == "0.conv1_1" and key == "weight" and tensor.shape[1] == 3 and isinstance(layer, nn.Conv2d):
                    tensor = adapt_first_conv(tensor, layer.in_channels)
                check_shape(network, f"{path.partition('.')[2]}.{key}", layer.state_dict()[key], tensor)
                weights[f"encoder.{path}.{key}"] = tensor.detach()
    return weights


def _trunk(network: str, classifier: nn.Module) -> list[nn.Module]:
    """The layers of the classifier's `features`, which must be those of VGG-16, with or without norms."""
    layers = list(getattr(classifier, "features", nn.Sequential()).children())
    counted = [item for item in layers if isinstance(item, nn.Conv2d | nn.MaxPool2d)]
    kinds = "".join("c" if isinstance(item, nn.Conv2d) else "p" for item in counted)
    norms = sum(isinstance(item, nn.BatchNorm2d) for item in layers)
    if kinds != "".join("c" * depth + "p" for depth in DEPTHS) or norms not in (0, sum(DEPTHS)):
        raise UsageError(
            f"{network}: its encoder is that of VGG-16 (13 convolutions, 5 poolings), and the {type(classifier).__name__} "
            "given is another network. Start from torchvision/vgg16_bn or torchvision/vgg16."
        )
    return layers


def check_shape(network: str, name: str, own: Tensor, given: Tensor) -> None:
    """Raises `UsageError` if the classifier's tensor has not the shape of the network's own."""
    if own.shape != given.shape:
        raise UsageError(
            f"{network}: {name} has the shape {tuple(own.shape)}, and {tuple(given.shape)} in the classifier. Choose widths "
            "as the classifier has them; those of the libraries have the defaults."
        )
