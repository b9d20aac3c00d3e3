"""Networks: one paper, one file; importing this package registers them all."""

from pixelwise.models import (  # noqa: F401  (they register themselves)
    bayesian_segnet,
    deconvnet,
    encoder_decoder,
    enet,
    fcdensenet,
    fcn,
    fullres_cnn,
    linknet,
    mirror,
    patch_classifier,
    segnet,
    unet,
)
from pixelwise.models.registry import (
    ModelInfo,
    count_parameters,
    create_model,
    describe_model,
    list_models,
    model_config,
    model_info,
)

__all__ = [
    "ModelInfo",
    "count_parameters",
    "create_model",
    "describe_model",
    "list_models",
    "model_config",
    "model_info",
]
