"""A training step, equal backbone and weights of the encoder: ours against smp's U-Net, on the same eight crops of 352 px.

Ours is the step of the Lightning module with all that a run does: normalisation, weighted cross-entropy, clipped gradients,
AdamW, averaged weights. smp's is forward, cross-entropy, backward, AdamW on crops that are normalised already: plain
(float32, NCHW), and at its best (bfloat16 autocast, channels_last).
"""

import networks
import torch
import torch.nn.functional as F
from measure import Row, Setup, Turn, compare, interleave, timed
from torch import Tensor, nn

from pixelwise.machine import keep_freed_memory

GOALS = {"smp, plain": 4.0, "smp, at its best": 2.4}


def run(setup: Setup) -> list[Row]:
    rows = []
    for backbone in networks.BACKBONES[: 1 if setup.small else None]:
        size = {"crop_px": 64, "batch_size": 2} if setup.small else {"crop_px": 352, "batch_size": 8}
        module, batch = networks.training_module(setup.scratch, backbone, **size)
        crops, labels = _crops(batch[0]), batch[-1].long()
        theirs = networks.peer(backbone, module.model)
        same = networks.difference_of_features(module.model.eval(), theirs)
        module.model.train()
        turns = {"pixelwise": ours(module, batch)}
        for peer in GOALS:
            model = networks.peer(backbone, module.model).train()
            is_best = peer != "smp, plain"
            turns[peer] = smp(model, (crops - 0.5) / 0.5, labels, is_best=is_best)
        seconds = interleave(turns, setup.rounds(5))
        for peer, goal in GOALS.items():
            what = {"race": "training step", "case": f"{backbone}, {len(crops)} crops of {size['crop_px']} px"}
            what |= {"unit": "images/s", "goal": goal, "checked": f"same crops; {same}"}
            rows.append(compare(seconds, "pixelwise", peer, amount=len(crops), **what))
    return rows


def _crops(images: Tensor) -> Tensor:
    """As smp takes them: (N, C, H, W), float32 in unit scale."""
    images = images.permute(0, 3, 1, 2)[:, :3].contiguous()  # without the channel that tells where there are data
    return images / 255 if images.dtype == torch.uint8 else images


def ours(module, batch: tuple[Tensor, ...]) -> Turn:
    optimizer, clip = module.configure_optimizers(), module.config.clip_norm
    is_bf16 = module.plan.precision == "bf16"

    def step() -> None:
        moved = module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = module.training_step(moved, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        module.average.update_parameters(module.model)

    def turn() -> float:
        keep_freed_memory(True)  # as a run does; not for smp's turns
        try:
            return timed(step)()
        finally:
            keep_freed_memory(False)

    return turn


def smp(model: nn.Module, image: Tensor, labels: Tensor, *, is_best: bool) -> Turn:
    if is_best:
        model = model.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_best):
            logits = model(image)
        F.cross_entropy(logits.float(), labels, ignore_index=255).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step)
