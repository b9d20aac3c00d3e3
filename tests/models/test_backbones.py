import pytest
import torch
import torchvision.models as tv
from timm.models import adapt_input_conv
from torch import nn
from torchvision.transforms import v2

from pixelwise.errors import UsageError
from pixelwise.models.backbones import (
    backbone_normalisation,
    classifier_state,
    create_backbone,
    resolve_backbone,
    torchvision_classifier,
)

TRUNKS = {
    "resnet10t": ([64, 64, 128, 256, 512], [2, 4, 8, 16, 32]),
    "mobilenetv3_small_050": ([16, 8, 16, 24, 288], [2, 4, 8, 16, 32]),
    "convnext_atto": ([40, 80, 160, 320], [4, 8, 16, 32]),
    "vgg11": ([64, 128, 256, 512, 512, 512], [1, 2, 4, 8, 16, 32]),
    "torchvision/vgg11": ([64, 128, 256, 512, 512, 512], [1, 2, 4, 8, 16, 32]),
    "alexnet": ([64, 192, 256, 256], [4, 8, 16, 32]),
    "squeezenet1_1": ([64, 128, 256, 512], [2, 4, 8, 16]),
    "swin_tiny_patch4_window7_224": ([96, 192, 384, 768], [4, 8, 16, 32]),
    "vit_tiny_patch16_224": ([192], [16]),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_maps_are_those_that_channels_and_strides_tell(name):
    with torch.device("meta"):
        trunk = create_backbone(name, in_channels=4).eval()
        maps = trunk(torch.zeros(2, 4, 224, 448))
    assert (trunk.channels, trunk.strides) == TRUNKS[name]
    assert [item.shape[:2] for item in maps] == [(2, channels) for channels in trunk.channels]
    exact = name not in ("alexnet", "squeezenet1_1")  # these do not pad
    for item, stride in zip(maps, trunk.strides, strict=True):
        height, width = item.shape[-2:]
        assert abs(height - 224 / stride) <= (0 if exact else 1.01)
        assert abs(width - 448 / stride) <= (0 if exact else 1.01)


def test_building_a_trunk_leaves_its_statistics_fresh():
    trunk = create_backbone("torchvision/mnasnet0_5")
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and trunk.training
    assert all((norm.running_mean == 0).all() and norm.num_batches_tracked == 0 for norm in norms)


def test_a_trunk_of_torchvision_has_its_names_and_no_head():
    with torch.device("meta"):
        names = set(create_backbone("torchvision/mnasnet0_5").state_dict())
        whole = set(tv.mnasnet0_5().state_dict())
    assert {name.removeprefix("body.") for name in names} <= whole
    assert not any("classifier" in name for name in names)


def test_timm_comes_first_unless_torchvision_is_named():
    assert resolve_backbone("resnet18") == ("timm", "resnet18")
    assert resolve_backbone("timm/resnet18") == ("timm", "resnet18")
    assert resolve_backbone("torchvision/resnet18") == ("torchvision", "resnet18")
    assert resolve_backbone("alexnet") == ("torchvision", "alexnet")  # timm has none


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "no backbone called 'resnet81' in timm or torchvision. Did you mean .*resnet18"),
        ("torchvision/convnext_atto", "no backbone called 'torchvision/convnext_atto'"),
        ("timm/alexnet", "no backbone called"),
        ("github/resnet18", "no backbone called"),
        ("torchvision/deeplabv3_resnet50", "no backbone called"),  # a classifier it is not
        ("", "no backbone called ''"),
    ],
)
def test_an_unknown_name_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        create_backbone(name)


def test_a_classifier_for_one_size_is_refused():
    with pytest.raises(UsageError, match="'vit_b_16' does not take images of 448 px"):
        create_backbone("torchvision/vit_b_16")


def test_the_state_of_a_classifier_has_no_memory_behind_it():
    state = classifier_state("torchvision/vgg11")
    assert all(tensor.is_meta for tensor in state.values())
    assert next(iter(state)) == "features.0.weight" and state["classifier.6.weight"].shape == (1000, 4096)


def test_normalisation_is_that_of_the_weights():
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert backbone_normalisation("torchvision/vgg11") == imagenet
    assert backbone_normalisation("resnet18") == imagenet
    assert backbone_normalisation("tf_efficientnet_lite0") == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_from_tensorflow_see_what_torchvision_would_make_of_the_image(name):
    with torch.device("meta"):
        model = torchvision_classifier(name)
    assert not model.transform_input  # so the normalisation has to be the weights' own
    image = torch.rand(1, 3, 4, 5)
    model.transform_input = True
    imagenet = v2.functional.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own = v2.functional.normalize(image, *backbone_normalisation(f"torchvision/{name}"))
    assert torch.allclose(model._transform_input(imagenet), own, atol=1e-6)


def test_rgb_weights_for_other_channels():
    weight = torch.randn(4, 3, 5, 5)
    assert torch.equal(adapt_input_conv(3, weight), weight)
    assert torch.allclose(adapt_input_conv(1, weight), weight.sum(1, keepdim=True))
    for channels in (2, 4, 7):  # the same grey in all channels gives what it gave in RGB
        adapted = adapt_input_conv(channels, weight)
        assert adapted.shape == (4, channels, 5, 5)
        kept = weight[:, [index % 3 for index in range(channels)]]
        assert torch.allclose(adapted, kept * 3 / channels, atol=1e-6)
