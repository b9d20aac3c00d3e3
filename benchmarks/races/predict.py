"""Whole commands: a folder of 233 photos of 360 x 480 px to label images on the disk, starting the program included.

`pixelwise predict` against a plain loop over smp's U-Net on the same backbone (read with PIL, normalise, pass, argmax, write
PNG; float32, NCHW, eager; and the same with bfloat16 and channels_last), and ultralytics' semantic predict with its smallest
network (random weights from its YAML: nothing is downloaded), whose masks are written as PNG too. CamVid's test photos where
the real data are at hand, else drawn scenes.

    python benchmarks/races/predict.py {plain,best,ultralytics} PHOTOS OUT      # a single turn of a peer
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where a turn starts

import numpy as np
from measure import Row, Setup, Turn, compare, interleave
from PIL import Image

BACKBONE = "tf_efficientnet_lite0"
PHOTOS, GOAL = 233, 4.0
PEERS = {
    "smp, plain loop": "plain",
    "smp, the same loop with bf16 and channels_last": "best",
    "ultralytics, yolo26n-sem": "ultralytics",
}
ENDINGS = {".png", ".webp", ".jpg"}


def run(setup: Setup) -> list[Row]:
    photos, what = photos_of(setup)
    network = setup.scratch / "network"
    save_network(network)
    count = len(list(photos.iterdir()))
    program = str(Path(sys.executable).with_name("pixelwise"))
    command = [program, "predict", str(network), str(photos), "--out"]
    turns = {"pixelwise": turn(command, setup.scratch / "labels", count)}
    for name, who in PEERS.items():
        out = setup.scratch / f"labels-{who}"
        turns[name] = turn([sys.executable, __file__, who, str(photos)], out, count)
    seconds = interleave(turns, setup.rounds(2), warm_up=False)
    about = {"race": "predict", "case": f"{count} {what}", "unit": "photos/s", "checked": f"{count} label images each"}
    return [
        compare(seconds, "pixelwise", name, amount=count, goal=GOAL if who == "plain" else None, **about)
        for name, who in PEERS.items()
    ]


def photos_of(setup: Setup) -> tuple[Path, str]:
    """A folder with nothing but the photos, and what they are."""
    photos = setup.scratch / "photos"
    shutil.rmtree(photos, ignore_errors=True)
    count = 6 if setup.small else 60 if setup.few else PHOTOS
    if setup.data and (setup.data / "camvid").is_dir():
        photos.mkdir()
        for path in sorted((setup.data / "camvid" / "test").iterdir())[:count]:
            shutil.copyfile(path, photos / path.name)
        return photos, "photos of CamVid"
    from pixelwise.data.scenes import write_scenes

    drawn = write_scenes(setup.scratch / "scenes-predict", {"test": count}, sizes=((360, 480),))
    shutil.copytree(drawn / "test" / "images", photos)
    return photos, "drawn scenes"


def save_network(folder: Path) -> None:
    import networks

    from pixelwise.infer.bundle import save_bundle

    shutil.rmtree(folder, ignore_errors=True)
    model = networks.create("encoder_decoder", backbone=BACKBONE)
    save_bundle(folder, model, networks.card("encoder_decoder", backbone=BACKBONE))


def turn(command: list[str], out: Path, count: int) -> Turn:
    """The seconds of a command that fills `out` with labels of all photos."""

    def seconds() -> float:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        done = subprocess.run([*command, str(out)], capture_output=True, text=True, env=environment(out))
        spent = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:4])}: {done.stderr[-800:]}")
        sizes = {Image.open(path).size for path in out.glob("*.png")}
        if (found := len(list(out.glob("*.png")))) != count or sizes != {(480, 360)}:
            raise RuntimeError(f"{' '.join(command[1:4])} wrote {found} label images of {sizes}, not {count}")
        return spent

    return seconds


def environment(out: Path) -> dict[str, str]:
    """With what keeps ultralytics off the network, as its documentation says."""
    settings = out.parent / "ultralytics"
    settings.mkdir(exist_ok=True)
    offline = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(settings)}
    return os.environ | offline


def smp_loop(photos: Path, out: Path, *, is_best: bool) -> None:
    import segmentation_models_pytorch as smp
    import torch

    torch.manual_seed(0)
    model = smp.Unet(f"tu-{BACKBONE}", encoder_weights=None, classes=11).eval()
    model = model.to(memory_format=torch.channels_last) if is_best else model
    for path in sorted(photos.iterdir()):
        image = np.array(Image.open(path).convert("RGB"))
        x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        height, width = x.shape[-2:]
        x = torch.nn.functional.pad(x, (0, -width % 32, 0, -height % 32), mode="replicate")
        x = x.contiguous(memory_format=torch.channels_last) if is_best else x.contiguous()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_best):
            labels = model(x).argmax(1)[0, :height, :width]
        Image.fromarray(labels.to(torch.uint8).numpy()).save(out / f"{path.stem}.png")


def ultralytics_loop(photos: Path, out: Path) -> None:
    from ultralytics import YOLO, settings

    settings.update({"sync": False})
    model = YOLO("yolo26n-sem.yaml", task="semantic")
    for result in model.predict(source=str(photos), stream=True, verbose=False, device="cpu"):
        labels = result.semantic_mask.data.cpu().numpy().astype(np.uint8)
        Image.fromarray(labels).save(out / f"{Path(result.path).stem}.png")


def main() -> None:
    who, photos, out = sys.argv[1:]
    Path(out).mkdir(parents=True)
    loops: dict[str, Callable[[Path, Path], None]] = {
        "plain": lambda *paths: smp_loop(*paths, is_best=False),
        "best": lambda *paths: smp_loop(*paths, is_best=True),
        "ultralytics": ultralytics_loop,
    }
    loops[who](Path(photos), Path(out))


if __name__ == "__main__":
    main()
