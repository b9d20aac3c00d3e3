"""Inference in float32: our Predictor against ONNX Runtime on our own export, for the same networks and weights."""

import copy
from pathlib import Path

import networks
import torch
from measure import Row, Setup, compare, equal_share, fastest, interleave, timed

GOAL = 1.0
PEER = "ONNX Runtime"
TURN_S = 0.5  # so that the threads of the other, which still wait busily when a turn begins, hardly count


def run(setup: Setup) -> list[Row]:
    rows = []
    for backbone in networks.BACKBONES[: 1 if setup.small else None]:
        model = networks.create("encoder_decoder", backbone=backbone)
        for batch in (1,) if setup.few else (1, 8):
            rows.append(_race(setup, backbone, model, batch))
    return rows


def _race(setup: Setup, backbone: str, model: torch.nn.Module, batch: int) -> Row:
    import onnxruntime

    torch.manual_seed(1)
    x = torch.randn(batch, 3, *((90, 120) if setup.small else (360, 480)))
    path = str(setup.scratch / f"{backbone}-{batch}.onnx")
    torch.onnx.export(copy.deepcopy(model), (x,), path, dynamo=True, input_names=["image"], verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    about, array = networks.card("encoder_decoder", backbone=backbone), x.numpy()
    mine = {
        f"pixelwise, {kind}": networks.ready(model, about, precision="float32", accelerate=kind)
        for kind in ("none", "fold")
    }
    turns = {name: timed(lambda it=it: networks.labels(it, x), TURN_S) for name, it in mine.items()}
    turns[PEER] = timed(lambda: session.run(None, {"image": array})[0].argmax(1), TURN_S)
    seconds = interleave(turns, setup.rounds(5))
    best = fastest(seconds, *mine)
    theirs = session.run(None, {"image": array})[0].argmax(1)
    Path(path).unlink()
    return compare(
        seconds,
        best,
        PEER,
        race="float32",
        case=f"{backbone}, {'one photo' if batch == 1 else f'batch of {batch}'}",
        unit="images/s",
        amount=batch,
        goal=GOAL,
        checked=equal_share(networks.labels(mine[best], x).numpy(), theirs),
        note=best,
    )
