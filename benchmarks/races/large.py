"""Images of 2,048², 4,096² and 8,192² px by windows: our exact stripes, MONAI's sliding window, one pass where it fits.

All run the same U-Net (`large_images.py` says how), in bfloat16 where the machine computes in it; every turn is a process of
its own, so our planning is part of our time. MONAI gets its default mode and those windows that are fastest for it here.
"""

from argparse import Namespace

import large_images
import numpy as np
import torch
from measure import Row, Setup, compare, interleave

from pixelwise.infer.devices import computes_in_bf16

SIZES = {2048: 3, 4096: 2, 8192: 1}  # and the rounds
WINDOWS = ("monai-constant:512:1", "monai-constant:512:4", "monai-constant:1024:1")
OF_MONAI, OF_ONE_PASS = 1 / 0.7, 1 / 1.15  # goals: 0.7 of MONAI's time, 1.15 of one pass


def run(setup: Setup) -> list[Row]:
    sizes = {512: 1} if setup.small else {2048: 3} if setup.few else SIZES
    smallest = min(sizes)
    args = Namespace(
        device="cpu",
        precision="bf16" if computes_in_bf16(torch.device("cpu")) else "float32",
        classes=11,
        widths=[16, 32, 64, 128, 256],
        accelerate="auto",
    )
    tried = {name: large_images.start(args, name, smallest)["seconds"] for name in WINDOWS}
    best = min(tried, key=lambda name: tried[name])
    rows = []
    for size, rounds in sizes.items():
        names = {"pixelwise": "pixelwise", "MONAI": best}
        if size == smallest:
            names["one pass"] = "one-pass"
        turns = {
            name: lambda full=full, size=size: large_images.start(args, full, size)["seconds"]
            for name, full in names.items()
        }
        seconds = interleave(turns, setup.rounds(rounds), warm_up=False)
        checked = _difference(setup, args, size) if size == smallest else ""
        for peer in list(names)[1:]:
            goal = OF_MONAI if peer == "MONAI" else OF_ONE_PASS
            about = {"race": "large images", "case": f"{size:,}² px, {args.precision}", "unit": "Mpx/s", "goal": goal}
            note = f"windows of {best.split(':')[1]} px, {best.split(':')[2]} at a time" if peer == "MONAI" else ""
            rows.append(compare(seconds, "pixelwise", peer, amount=size**2 / 1e6, checked=checked, note=note, **about))
    return rows


def _difference(setup: Setup, args: Namespace, size: int) -> str:
    """Which share of our labels is that of one pass, in words; of random weights and in bfloat16 some are ties."""
    paths = {name: setup.scratch / f"{name}.npy" for name in ("pixelwise", "one-pass")}
    for name, path in paths.items():
        large_images.start(args, name, size, path)
    ours, whole = (np.load(path) for path in paths.values())
    return f"{float((ours == whole).mean()):.3%} of our labels are those of one pass"
