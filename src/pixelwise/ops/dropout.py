"""Dropout that acts in evaluation: Monte-Carlo dropout, and dropout whose mask belongs to the place in the map.

Torch draws the mask of a map in the order of its memory, so tiles, batches and devices see different ones. In
`spatial_dropout`, whether a value is dropped is a hash of (seed, sample, layer, channel, row, column of the whole map) and
of nothing else: passes over tiles drop what one pass over the whole image drops.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MASK_64 = (1 << 64) - 1
_CALLS_BITS = 16  # a layer's number is that of its module, then that of the call within the pass
_CHUNK = {"cpu": 1 << 16}  # values at a time: their int32 and float buffers stay in the cache
_CHUNK_ELSEWHERE = 1 << 24


@torch.no_grad()
def sample_with_dropout(
    model: nn.Module, image: Tensor, *, samples: int = 50, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the softmax over passes in which dropout acts (Bayesian SegNet, arXiv:1511.02680, section 4).

    All else is as in evaluation: batch norm uses its running statistics. Mean and variance are updated pass by pass
    (Welford 1962), so that memory does not grow with `samples`. Modes and state of `model` are afterwards what they were.

    Args:
        model: maps images (N, C, H, W) to logits (N, K, H, W) and has dropout layers, else it is a UsageError.
        image: (N, C, H, W).
        samples: passes, at least 1; the paper takes 50.
        seed: makes the result repeatable on one device (CPU or CUDA) and leaves torch's own random numbers as they are.

    Returns:
        mean probabilities (N, K, H, W), float32, and uncertainty (N, H, W): the variance of each class's probability over
        the passes (divided by their number), averaged over the classes; 0 to 0.25.
    """
    if samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}.")
    modes = {module: module.training for module in model.modules()}
    dropouts = [module for module in modes if isinstance(module, DROPOUTS)]
    if not dropouts:
        raise UsageError(
            f"{type(model).__name__} has no dropout layers, so that all its passes are equal. Choose bayesian_segnet or "
            "another network with dropout."
        )
    try:
        model.eval()
        for dropout in dropouts:
            dropout.train()
        with seeded(image.device, seed):
            return _mean_and_variance(model, image, samples)
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Random numbers on `device` that start from `seed`; afterwards they go on as if nothing had been drawn."""
    if seed is None:
        yield
        return
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _mean_and_variance(model: nn.Module, image: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    mean = model(image).float().softmax(dim=1)  # (N, K, H, W)
    squares = torch.zeros_like(mean[:, 0])  # (N, H, W): squared distances from the mean, averaged over the classes
    for count in range(2, samples + 1):
        probability = model(image).float().softmax(dim=1)
        distance = probability - mean
        mean += distance / count
        squares += (distance * (probability - mean)).mean(dim=1)
    return mean, squares / samples


@torch.library.custom_op("pixelwise::spatial_dropout", mutates_args=())
def spatial_dropout(
    x: Tensor, p: float, seed: Tensor, sample: Tensor, layer: int, top: int, left: int, channelwise: bool
) -> Tensor:
    """Set a share `p` of the values of `x` to zero and divide the others by 1 - p.

    All images of a batch have the same mask, so what comes of one does not depend on the others. Only (N, C, H, W) has
    rows and columns; in (N, L, F), the places L count as rows and the features F as columns, in (N, C) both are 0.
    `seed` and `sample` (number of the pass) are int64 without dimensions; layers of other numbers `layer` have unrelated
    masks; `top` and `left` say where in the whole map the window `x` begins. `channelwise` drops whole channels (as
    `nn.Dropout2d`). The mask is a pure function of (seed, sample, layer, channel, row, column).
    """
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    maps, kept = _as_maps(x), _as_maps(out)
    scale = 1 / (1 - p) if p < 1 else 0.0
    # Kept where the hash, a signed number, is not below this. At p = 1 the threshold is out of range and nothing is kept.
    threshold = round(p * 2**32) - 2**31
    keys = _keys(int(seed.item()), int(sample.item()), layer)
    channels = _mix(_count(0, maps.shape[1], x.device).add_(keys[0]))
    if channelwise:
        factor = _factor(channels, threshold, scale, x.dtype)
        torch.mul(maps, factor.view(1, -1, 1, 1), out=kept)
        return out
    rows = _mix(_count(top, maps.shape[2], x.device).add_(keys[1]))
    columns = _mix(_count(left, maps.shape[3], x.device).add_(keys[2]))
    lines = _mix(channels[:, None] + rows)[:, :, None]  # (C, H, 1)
    order = (1, 2, 0) if maps.is_contiguous(memory_format=torch.channels_last) and maps.shape[1] > 1 else (0, 1, 2)
    maps, kept = (item.permute(0, *(axis + 1 for axis in order)) for item in (maps, kept))
    lines = lines.permute(order).contiguous().expand(maps.shape[1:])
    columns = columns.view(1, 1, -1).permute(order).expand(maps.shape[1:])
    for first, second in _chunks(maps.shape[1:], _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE)):
        noise = lines[first, second] + columns[first, second]
        factor = _factor(_mix(noise, last=False), threshold, scale, x.dtype)
        for image, result in zip(maps, kept, strict=True):
            torch.mul(image[first, second], factor, out=result[first, second])
    return out


@spatial_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor, sample: Tensor, layer: int, top: int, left: int, channelwise: bool) -> Tensor:
    return torch.empty_like(x)


class SpatialDropout(nn.Module):
    """Dropout that acts in every mode and by the place in the map; `with_spatial_dropout` puts it into networks.

    `index` is the module's number in its network; `seed` and `sample` (int64) are shared by all modules of a network.
    """

    seed: Tensor
    sample: Tensor

    def __init__(self, p: float, index: int, seed: Tensor, sample: Tensor, *, channelwise: bool = False) -> None:
        super().__init__()
        self.p, self.index, self.channelwise = p, index, channelwise
        self.register_buffer("seed", seed, persistent=False)  # not among the weights, which stay those of the network
        self.register_buffer("sample", sample, persistent=False)
        self.calls = [0]  # of this pass; a network may use one module at several places, and each has its own mask

    def forward(self, x: Tensor) -> Tensor:
        layer = self.index << _CALLS_BITS | self.calls[0]
        self.calls[0] += 1
        return spatial_dropout(x, self.p, self.seed, self.sample, layer, 0, 0, self.channelwise)

    def extra_repr(self) -> str:
        return f"p={self.p}, channelwise={self.channelwise}"


def with_spatial_dropout(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose dropout layers act by the place in the map; weights are shared.

    Modules of `nn.Dropout` and `nn.Dropout2d` are replaced. Dropout that code calls as a function (`F.dropout` with
    `training=self.training`) and stochastic depth stay off, as in `sample_with_dropout`. One copy serves one thread. No
    dropout layer with a share above 0, or one of a kind that has no counterpart here, is a UsageError.
    """
    weights = [*model.parameters(), *model.buffers()]
    result = copy.deepcopy(model, {id(item): item for item in weights}).eval()
    _refuse_others(result)
    device = weights[0].device if weights else torch.device("cpu")
    number, sample = (torch.tensor(value, dtype=torch.int64, device=device) for value in (_signed(seed, 64), 0))
    layers = [module for module in result.modules() if isinstance(module, DROPOUTS) and module.p > 0]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no dropout layers that drop anything, so that all its passes are equal. Choose "
            "bayesian_segnet or another network with dropout."
        )
    replaced = {
        id(layer): SpatialDropout(layer.p, index, number, sample, channelwise=isinstance(layer, nn.Dropout2d)).eval()
        for index, layer in enumerate(layers)
    }
    if id(result) in replaced:
        result = nn.Sequential(replaced[id(result)]).eval()
    for module in list(result.modules()):
        for name, child in module._modules.items():  # named_children would leave out the second name of a child
            module._modules[name] = replaced.get(id(child), child)
    result.register_forward_pre_hook(_start_pass)
    return result


def set_sample(model: nn.Module, sample: int) -> None:
    """Let the next passes of a network from `with_spatial_dropout` be those of pass number `sample`."""
    for layer in _layers(model):
        layer.sample.fill_(sample)


def _start_pass(model: nn.Module, args: tuple[Any, ...]) -> None:
    for layer in _layers(model):
        layer.calls[0] = 0


def _layers(model: nn.Module) -> Iterator[SpatialDropout]:
    return (module for module in model.modules() if isinstance(module, SpatialDropout))


def _refuse_others(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, DROPOUTS) and not isinstance(module, nn.Dropout | nn.Dropout2d) and module.p > 0:
            raise UsageError(
                f"{type(model).__name__}: {name or 'it'} is a {type(module).__name__}, which cannot be sampled in tiles; "
                "nn.Dropout and nn.Dropout2d can. Replace it, or predict without samples."
            )


def _as_maps(x: Tensor) -> Tensor:
    """(N, C, H, W) as it is; (N, L, F) as (N, 1, L, F), (N, C) as (N, C, 1, 1), (C,) as (1, C, 1, 1)."""
    if x.ndim == 4:
        return x
    if x.ndim == 3:
        return x[:, None]
    if x.ndim in (1, 2):
        return torch.atleast_2d(x)[:, :, None, None]
    raise UsageError(
        f"dropout in tiles acts on maps (N, C, H, W), not on {x.ndim} dimensions. Predict without samples."
    )


def _chunks(shape: torch.Size, values: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the first two axes that hold about `values` values each."""
    planes = max(1, values // (shape[1] * shape[2]))
    lines = shape[1] if planes > 1 else max(1, values // shape[2])
    for plane in range(0, shape[0], planes):
        for line in range(0, shape[1], lines):
            yield slice(plane, plane + planes), slice(line, line + lines)


def _factor(noise: Tensor, threshold: int, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale` where the noise (int32, overwritten) is not below the threshold, else 0."""
    if threshold > 2**31 - 1:
        return torch.zeros_like(noise, dtype=dtype)
    return noise.ge_(threshold).to(dtype).mul_(scale)


def _count(start: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + length, dtype=torch.int32, device=device)


def _keys(seed: int, sample: int, layer: int) -> tuple[int, int, int]:
    """Three unrelated numbers (signed, 32 bit) for channels, rows and columns."""
    state = 0
    for part in (seed, sample, layer):
        state = _mix_64(state + part)
    words = [_mix_64(state + place) for place in (1, 2, 3)]
    return _signed(words[0], 32), _signed(words[1], 32), _signed(words[2], 32)


def _mix_64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood, 2014) from this state."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK_64
    return value ^ value >> 31


def _mix(x: Tensor, *, last: bool = True) -> Tensor:
    """Scramble int32 numbers in place so that every bit depends on all (Wellons' lowbias32).

    `last` is the step that only the low bits need; a comparison of the whole numbers can do without.
    """
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(_shift_right(x, shift, shifted)).mul_(_signed(factor, 32))
    return x.bitwise_xor_(_shift_right(x, 16, shifted)) if last else x


def _shift_right(x: Tensor, bits: int, out: Tensor) -> Tensor:
    """Torch repeats the sign in an int32 that is shifted; here zeros come in."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << 32 - bits) - 1)


def _signed(value: int, bits: int) -> int:
    """The number with the same lowest bits in two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value
