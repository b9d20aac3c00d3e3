"""The one adapter to timm and torchvision: a classifier's trunk as a list of feature maps, known by channels and strides.

The libraries are imported where they are used: importing them takes longer than a network without them labels a photo.
"""

import contextlib
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph

from pixelwise.errors import UsageError
from pixelwise.models.registry import suggestion
from pixelwise.ops.cost import without_memory

PROBE_PX = 224  # every classifier of the two libraries takes this size, and its halvings tell the strides apart


class Backbone(nn.Module):
    """A trunk that maps (N, C, H, W) to feature maps, finest first, of `channels` and `strides` (rising powers of two)."""

    def __init__(self, body: nn.Module, channels: list[int], strides: list[int], channels_last: bool) -> None:
        super().__init__()
        self.body, self.channels, self.strides = body, channels, strides
        self._channels_last = channels_last
        self._picked: list[int] | None = None

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.body(image)
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        if self._picked is not None:
            maps = [maps[index] for index in self._picked]
        return [item.permute(0, 3, 1, 2) for item in maps] if self._channels_last else maps


def create_backbone(name: str, *, in_channels: int = 3) -> Backbone:
    """The trunk of a timm or torchvision classifier with random weights; nothing is downloaded.

    Where both libraries have `name`, timm's is taken, unless it starts with `torchvision/`.

    Raises:
        UsageError: no such backbone, or one that gives no feature maps or takes one image size only.
    """
    library, name = resolve_backbone(name)
    return _timm_backbone(name, in_channels) if library == "timm" else _torchvision_backbone(name, in_channels)


def resolve_backbone(name: str) -> tuple[str, str]:
    """('timm' or 'torchvision', the name there).

    Raises:
        UsageError: neither has it.
    """
    import timm
    import torchvision.models as tv

    library, _, bare = name.rpartition("/")
    if library in ("", "timm") and timm.is_model(bare):
        return "timm", bare
    classifiers = tv.list_models(module=tv)
    if library in ("", "torchvision") and bare in classifiers:
        return "torchvision", bare
    known = [*timm.list_models(), *classifiers]
    raise UsageError(f"there is no backbone called {name!r} in timm or torchvision.{suggestion(bare, known)}")


def create_trunk(name: str, *, in_channels: int = 3) -> nn.Module:
    """A network with fresh random weights whose modules stand where those of `create_backbone(name).body` do.

    The body of a torchvision backbone is a graph without the library's own blocks; here, they are there, head included.
    """
    library, name = resolve_backbone(name)
    return _timm_backbone(name, in_channels).body if library == "timm" else torchvision_classifier(name, in_channels)


def _timm_backbone(name: str, in_channels: int) -> Backbone:
    import timm

    body = None
    attempts: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
    for options in attempts:
        with contextlib.suppress(TypeError):  # families that do not know an option say so with a TypeError
            body = timm.create_model(name, features_only=True, pretrained=False, in_chans=in_channels, **options)
            break
    if body is None:
        raise UsageError(f"backbone {name!r} gives no feature maps (timm: features_only). Choose another.")
    info: Any = body.feature_info
    strides = [int(value) for value in info.reduction()]
    # Transformers give several maps of one stride: the last one has seen most.
    picked = [index for index, stride in enumerate(strides) if stride not in strides[index + 1 :]]
    channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
    backbone = Backbone(body, [info.channels()[i] for i in picked], [strides[i] for i in picked], channels_last)
    backbone._picked = picked if len(picked) < len(strides) else None
    return backbone


def torchvision_classifier(name: str, in_channels: int = 3) -> nn.Module:
    """A torchvision classifier with random weights whose first convolution takes `in_channels`."""
    import torchvision.models as tv

    extra = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    try:
        model = tv.get_model(name, weights=None, **extra)
    except NotImplementedError:  # RegNet computes its widths with tensors, which hold no numbers on the device "meta"
        with torch.device("cpu"):
            model = tv.get_model(name, weights=None, **extra)
        model.to("meta")
    if in_channels != 3:
        path, first = next((path, item) for path, item in model.named_modules() if isinstance(item, nn.Conv2d))
        kernel, stride, padding = cast(tuple[Any, Any, Any], (first.kernel_size, first.stride, first.padding))
        bias = first.bias is not None
        model.set_submodule(path, nn.Conv2d(in_channels, first.out_channels, kernel, stride, padding, bias=bias))
    return model


def _torchvision_backbone(name: str, in_channels: int) -> Backbone:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision_classifier(name, in_channels)
    nodes = _stage_ends(name)
    if len(nodes) < 2:
        raise UsageError(f"backbone {name!r} of torchvision gives no pyramid of feature maps. Choose another.")
    ends = list(nodes.values())
    body = create_feature_extractor(model, train_return_nodes=ends, eval_return_nodes=ends)
    with torch.no_grad():
        maps = body.eval()(torch.zeros(1, in_channels, PROBE_PX, PROBE_PX))
    return Backbone(body.train(), [item.shape[1] for item in maps.values()], list(nodes), False)


def _stage_ends(name: str) -> dict[int, str]:
    """For each stride the last node of the graph that has it, before the maps are pooled to a vector.

    The last one through which all goes, if there is such a node: the end of a stage, not the middle of the next block.
    """
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    with torch.device("meta"):
        model = torchvision_classifier(name).eval()
        names = get_graph_node_names(model)[1][1:]  # without the image itself
        extractor = create_feature_extractor(model, return_nodes=names)
        try:
            maps, large = (extractor(torch.zeros(1, 3, px, px)) for px in (PROBE_PX, 2 * PROBE_PX))
        except (AssertionError, RuntimeError) as error:
            raise UsageError(
                f"backbone {name!r} does not take images of {2 * PROBE_PX} px ({error}); it is made for one size. Choose "
                "another."
            ) from error
    narrow = _narrow_nodes(extractor.graph)
    ends: dict[int, str] = {}
    for node, out in maps.items():
        if not isinstance(out, Tensor) or out.ndim != 4 or node.split(".")[0] in ("classifier", "fc", "head", "heads"):
            continue  # a head's maps are scores, not features
        size = out.shape[-1]
        if size < 2 or large[node].shape[-1] < 2 * size - 1:
            continue  # adaptive pooling keeps its size when the image doubles
        # AlexNet's maps of 55, 27, 13 stand for strides 4, 8, 16: the nearest power of two.
        stride = 2 ** round(math.log2(PROBE_PX / size))
        if stride >= max(ends, default=1) and (node in narrow or ends.get(stride) not in narrow):
            ends[stride] = node
    return ends


def _narrow_nodes(graph: Graph) -> set[str]:
    """Names of the nodes behind which nothing needs an earlier one."""
    *nodes, end = graph.nodes
    place = {node: index for index, node in enumerate(nodes)}
    needed = 0  # up to this place, somebody needs a node seen so far
    narrow = set()
    for index, node in enumerate(nodes):
        if needed <= index:
            narrow.add(node)
        if node.op != "get_attr":  # a parameter is no map
            needed = max([needed, *(place[user] for user in node.users if user is not end)])
    return {name for name, node in end.args[0].items() if node in narrow}


def smallest_px(network: nn.Module, stride: int, in_channels: int, backbone: str) -> int:
    """The least multiple of `stride` that a network on `backbone` takes; unpadded ones (AlexNet) need more than one."""
    hollow, reason = without_memory(network).eval(), ""
    for size_px in range(stride, PROBE_PX + 1, stride):
        try:
            for width_px in (size_px, size_px + stride):
                hollow(torch.empty(1, in_channels, size_px, width_px, device="meta"))
            return size_px
        # torch: "Output size is too small"; timm asserts the size of networks that are made for one only.
        except (AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
    raise UsageError(f"backbone {backbone!r} takes images of one size, or of few, only ({reason}). Choose another.")


def classifier_state(name: str) -> dict[str, Tensor]:
    """The classifier's own tensors by name, in its own order, without memory behind them (device meta)."""
    with torch.device("meta"):
        return create_classifier(name).state_dict()


def create_classifier(name: str) -> nn.Module:
    """A classifier of timm or torchvision with random weights, head included."""
    import timm

    library, name = resolve_backbone(name)
    return timm.create_model(name) if library == "timm" else torchvision_classifier(name)


def backbone_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (unit scale, RGB) with which the library's weights of `name` were trained."""
    import timm

    library, name = resolve_backbone(name)
    if library == "timm":
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if config is not None:
            return tuple(config.mean), tuple(config.std)
    if name in ("googlenet", "inception_v3"):  # their weights come from TensorFlow; torchvision converts images inside
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
