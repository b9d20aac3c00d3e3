"""Which rule computes the windows of which of torch's operations."""

import operator

from pixelwise.ops.streaming import kernels, pointwise, resample
from pixelwise.ops.streaming.axes import Rule
from pixelwise.ops.streaming.graph import Call, RuleMaker

_MAKERS: dict[RuleMaker, str] = {
    pointwise.Identity: "dropout.default feature_dropout.default alpha_dropout.default dropout_.default",
    pointwise.AlongChannels: "softmax.int _softmax.default log_softmax.int _log_softmax.default sum.dim_IntList mean.dim "
    "amax.default logsumexp.default",
    pointwise.Chunked: "chunk.default split.Tensor split_with_sizes.default",
    pointwise.Reshaped: "view.default reshape.default squeeze.dim squeeze.dims unsqueeze.default",
    pointwise.Permuted: "permute.default transpose.int",
    pointwise.Normalised: "batch_norm.default",
    pointwise.Joined: "cat.default",
    pointwise.NormOfChannels: "layer_norm.default",
    pointwise.LinearOfChannels: "linear.default",
    pointwise.PooledChannels: "avg_pool3d.default",
    kernels.Convolution: "conv2d.default conv2d.padding",
    kernels.TransposedConvolution: "conv_transpose2d.input",
    kernels.MaxPooling: "max_pool2d.default max_pool2d_with_indices.default",
    kernels.MaxUnpooling: "max_unpool2d.default",
    kernels.AveragePooling: "avg_pool2d.default",
    resample.padding: "pad.default constant_pad_nd.default replication_pad2d.default reflection_pad2d.default",
    resample.slicing: "slice.Tensor narrow.default",
    resample.index_selecting: "index_select.default",
    resample.Flip: "flip.default",
    resample.BilinearResampling: "upsample_bilinear2d.vec upsample_bilinear2d.default",
    resample.nearest: "upsample_nearest2d.vec upsample_nearest2d.default",
    resample.PixelShuffle: "pixel_shuffle.default",
}
RULES: dict[str, RuleMaker] = {f"aten.{name}": maker for maker, names in _MAKERS.items() for name in names.split()} | {
    "pixelwise.spatial_dropout.default": pointwise.DroppedByPlace
}


def rule_of(call: Call) -> Rule:
    """The rule of an operation; NotWindowed if it has none, or its own does not suit it."""
    if call.op is operator.getitem:
        return pointwise.Chunk(call)
    if maker := RULES.get(str(call.op)):
        return maker(call)
    if pointwise.is_placewise(call.op):
        return pointwise.Placewise(call)
    raise call.refusal("it is not known here, or needs the whole image at once")
