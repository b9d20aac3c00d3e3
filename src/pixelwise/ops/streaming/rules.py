"""Which rule computes the windows of which of torch's operations."""

from pixelwise.ops.streaming import kernels, pointwise, resample
from pixelwise.ops.streaming.graph import RuleMaker

_CHANNELS = ("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default", "sum.dim_IntList", "mean.dim",
             "amax.default", "logsumexp.default")  # fmt: skip
_RESHAPES = ("view.default", "reshape.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default")

RULES: dict[str, RuleMaker] = {
    **dict.fromkeys(pointwise.PLACEWISE, pointwise.Placewise),
    **dict.fromkeys((f"aten.{name}" for name in pointwise.IN_PLACE), pointwise.Placewise),
    **dict.fromkeys(pointwise.IDENTITY, pointwise.Identity),
    **dict.fromkeys((f"aten.{name}" for name in _CHANNELS), pointwise.AlongChannels),
    **dict.fromkeys(("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"), pointwise.Chunked),
    **dict.fromkeys((f"aten.{name}" for name in _RESHAPES), pointwise.Reshaped),
    **dict.fromkeys(("aten.permute.default", "aten.transpose.int"), pointwise.Permuted),
    "aten.batch_norm.default": pointwise.Normalised,
    "aten.cat.default": pointwise.Joined,
    "aten.layer_norm.default": pointwise.NormOfChannels,
    "aten.linear.default": pointwise.LinearOfChannels,
    "aten.avg_pool3d.default": pointwise.PooledChannels,
    "pixelwise.spatial_dropout.default": pointwise.DroppedByPlace,
    "getitem": pointwise.Chunk,
    "aten.conv2d.default": kernels.Convolution,
    "aten.conv2d.padding": kernels.Convolution,
    "aten.conv_transpose2d.input": kernels.TransposedConvolution,
    "aten.max_pool2d.default": kernels.MaxPooling,
    "aten.max_pool2d_with_indices.default": kernels.MaxPooling,
    "aten.max_unpool2d.default": kernels.MaxUnpooling,
    "aten.avg_pool2d.default": kernels.AveragePooling,
    **dict.fromkeys(("aten.pad.default", "aten.constant_pad_nd.default"), resample.padding),
    **dict.fromkeys(("aten.replication_pad2d.default", "aten.reflection_pad2d.default"), resample.padding),
    **dict.fromkeys(("aten.slice.Tensor", "aten.narrow.default"), resample.slicing),
    "aten.index_select.default": resample.index_selecting,
    "aten.flip.default": resample.Flip,
    **dict.fromkeys(("aten.upsample_bilinear2d.vec", "aten.upsample_bilinear2d.default"), resample.BilinearResampling),
    **dict.fromkeys(("aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default"), resample.NearestResampling),
    "aten.pixel_shuffle.default": resample.PixelShuffle,
}
