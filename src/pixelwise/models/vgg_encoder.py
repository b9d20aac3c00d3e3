"""The thirteen convolutions of VGG-16 with batch norm: the encoder that SegNet and DeconvNet share, and VGG-16's weights.

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


def vgg16_weights(network: str, model: nn.Module, paths: tuple[str, ...], classifier: nn.Module) -> dict[str, Tensor]:
    """Entries of a network's state from the layers of a VGG-16 of any library, which are told by their order.

    They are for the convolutions and norms of `model` whose paths begin with one of `paths`: the thirteen, with norms or
    without, and perhaps fc6 and fc7.

    Raises:
        UsageError: another architecture, or other widths.
    """
    from timm.models import adapt_input_conv

    from pixelwise.ops.convolutionalize import convolutionalize

    kinds = nn.Conv2d | nn.BatchNorm2d
    own = [
        (path, layer) for path, layer in model.named_modules() if path.startswith(paths) and isinstance(layer, kinds)
    ]
    has_norms = any(isinstance(layer, nn.BatchNorm2d) for _, layer in own)
    has_head = sum(isinstance(layer, nn.Conv2d) for _, layer in own) > sum(DEPTHS)
    given = [(path, letter) for path, layer in classifier.named_modules() if (letter := _letter(layer))]
    order, trunk = "".join(letter for _, letter in given), "".join("c" * depth + "p" for depth in DEPTHS)
    order = order.replace("cn", "c") if has_norms else order
    if not order.startswith(trunk) or (has_head and order != trunk + "ccc"):
        raise UsageError(
            f"{network}: its encoder is that of VGG-16 (13 convolutions, 5 max poolings, 3 linear layers, "
            f"{'' if has_norms else 'no '}batch norm), and the {type(classifier).__name__} given is another network. Start "
            f"from {' or '.join(model.classifiers)}."  # type: ignore[arg-type]
        )
    layers = dict((convolutionalize(classifier) if has_head else classifier).named_modules())
    sources = {kind: iter([layers[path] for path, letter in given if letter == kind]) for kind in "cn"}
    weights: dict[str, Tensor] = {}
    for path, layer in own:
        source = next(sources[_letter(layer)], nn.Identity())  # a plain VGG-16 has no norms
        name = path.removesuffix(".0").rpartition(".")[2]
        for key, tensor in source.state_dict().items():
            if name == "conv1_1" and key == "weight" and tensor.shape[1] == 3:
                tensor = adapt_input_conv(layer.weight.shape[1], tensor)
            wanted = layer.state_dict()[key].shape
            if tensor.shape != wanted:
                raise UsageError(
                    f"{network}: {name}.{key} has the shape {tuple(wanted)}, and {tuple(tensor.shape)} in the classifier. "
                    "Choose widths as the classifier has them; those of the libraries have the defaults."
                )
            weights[f"{path}.{key}"] = tensor.detach()
    return weights


def _letter(layer: nn.Module) -> str:
    """(c)onvolution or linear layer, batch (n)orm, max (p)ooling, or another layer with weights."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return "c"
    if isinstance(layer, nn.BatchNorm2d | nn.MaxPool2d):
        return "n" if isinstance(layer, nn.BatchNorm2d) else "p"
    return "?" if any(True for _ in layer.parameters(recurse=False)) else ""
