"""Inference, one 360 x 480 photo and a batch of eight: our encoder-decoder against smp's U-Net, equal backbone and weights.

From normalised pixels in memory to labels, the bare networks. smp runs as its documentation shows (float32, NCHW, eager),
and at its best: bfloat16 autocast and channels_last, eager or compiled with frozen weights, whichever is faster here. Ours
is raced with `--accelerate none` and `fold`.

The encoders are the same, the decoders are each library's own, so labels cannot be equal; the encoders' features must be.
smp's own network in our `Predictor` is raced too: there every weight is the same, and the labels are compared.
"""

import copy

import networks
import torch
from measure import Row, Setup, Turn, compare, equal_share, fastest, interleave, timed
from torch import Tensor, nn

PLAIN, BEST = "smp, plain", "smp, at its best"
EAGER, COMPILED = "bf16 and channels_last", "bf16, channels_last and torch.compile"
KINDS = ("none", "fold")
GOALS = {PLAIN: 6.0, BEST: 1.5}


def run(setup: Setup) -> list[Row]:
    rows = []
    for backbone in networks.BACKBONES[: 1 if setup.small else None]:
        ours = networks.create("encoder_decoder", backbone=backbone)
        theirs = networks.peer(backbone, ours)
        same = networks.difference_of_features(ours, theirs)
        for batch in (1, 8):
            torch.manual_seed(1)
            x = torch.randn(batch, 3, *((90, 120) if setup.small else (360, 480)))
            rows += _race(setup, backbone, ours, theirs, x, same)
    return rows


def _race(setup: Setup, backbone: str, ours: nn.Module, theirs: nn.Module, x: Tensor, same: str) -> list[Row]:
    about = networks.card("encoder_decoder", backbone=backbone)
    mine = {f"pixelwise, {kind}": networks.ready(ours, about, accelerate=kind) for kind in KINDS}
    turns = {name: timed(lambda it=it: networks.labels(it, x)) for name, it in mine.items()}
    turns |= _peers(theirs, x)
    inside = networks.ready(theirs, about)
    turns["smp in pixelwise"] = timed(lambda: networks.labels(inside, networks.padded(x)))
    seconds = interleave(turns, setup.rounds(5))
    best = fastest(seconds, *mine)
    truth = networks.labels(networks.ready(ours, about, precision="float32", accelerate="none"), x).numpy()
    checked = f"{same}; with float32, {equal_share(networks.labels(mine[best], x).numpy(), truth)}"
    what = {"race": "inference", "unit": "images/s", "amount": len(x)}
    case = f"{backbone}, {'one photo' if len(x) == 1 else f'batch of {len(x)}'}"
    seconds[BEST] = seconds[fastest(seconds, EAGER, COMPILED)]
    note = f"{best}; {BEST}: {fastest(seconds, EAGER, COMPILED)}"
    rows = [
        compare(seconds, best, peer, case=case, goal=goal, checked=checked, note=note, **what)
        for peer, goal in GOALS.items()
    ]
    with torch.inference_mode():
        plain = theirs(networks.padded(x)).argmax(1).to(torch.uint8).numpy()
    checked = equal_share(networks.labels(inside, networks.padded(x)).numpy(), plain)
    case += ", smp's own network in our Predictor"
    return [*rows, compare(seconds, "smp in pixelwise", PLAIN, case=case, checked=checked, **what)]


def _peers(model: nn.Module, x: Tensor) -> dict[str, Turn]:
    """smp's U-Net: plain, and at its best."""
    import torch._inductor.config as inductor

    inductor.freezing = True  # weights as constants, which is faster
    torch._dynamo.reset()
    image = networks.padded(x)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    rows = image.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(fast, dynamic=False)

    @torch.inference_mode()
    def plain() -> Tensor:
        return model(image).argmax(1)

    @torch.inference_mode()
    def at_best(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(rows).argmax(1)

    return {PLAIN: timed(plain), EAGER: timed(lambda: at_best(fast)), COMPILED: timed(lambda: at_best(compiled))}
