"""A TIFF of up to 30,000 x 30,000 pixels through `pixelwise predict`: what it says it will take, and what it takes.

For each size a tiled, compressed RGB BigTIFF is written tile by tile, labelled by the command line in a process of its own,
and deleted. Reported are the line that the process says before it starts, the memory that it states there, the peak of its
resident memory (VmHWM, with Python and PyTorch), and the seconds from start to end. Then whether memory grows with size.

    python benchmarks/gigapixel.py --out benchmarks/results
    python benchmarks/gigapixel.py --sizes 4000 8000 --widths 8 16 32
    python benchmarks/gigapixel.py --quick

The disk needs about 5 bytes for each pixel of the largest size.
"""

import argparse
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pixelwise.files import write_json

TILE_PX = 512
LIMIT_BYTES = 2 << 30
TOLERANCE = 0.2
_STATED = re.compile(r"at most ([0-9.]+) (GiB|MiB)")


def tiles(size: int) -> Iterator[NDArray[np.uint8]]:
    """Soft shapes with grain; sixteen tiles in changing order, each differently bright."""
    rng = np.random.default_rng(0)
    kinds = []
    for _ in range(16):
        coarse = Image.fromarray(rng.integers(0, 200, (12, 12, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC))
        kinds.append(soft + rng.integers(0, 8, soft.shape, dtype=np.uint8))
    count = math.ceil(size / TILE_PX)
    for index in range(count**2):
        yield kinds[(index * 7 + index // count) % 16] + np.uint8(index % 40)


def write_image(path: Path, size: int) -> None:
    tifffile.imwrite(
        path, tiles(size), shape=(size, size, 3), dtype=np.uint8, bigtiff=True, tile=(TILE_PX, TILE_PX), metadata=None,
        photometric="rgb", compression="zlib", compressionargs={"level": 1}, maxworkers=1, buffersize=1 << 22,
    )  # fmt: skip


def write_run(folder: Path, args: argparse.Namespace) -> None:
    """A network with random weights, as a training would leave it."""
    import torch

    from pixelwise.data.labels import LabelSpec
    from pixelwise.infer.bundle import ModelCard, save_bundle
    from pixelwise.models import create_model

    torch.manual_seed(0)
    config: dict[str, Any] = {"num_classes": args.classes, "in_channels": 3, **json.loads(args.config)}
    if args.widths:
        config["widths"] = tuple(args.widths)
    spec = LabelSpec(
        names=tuple(f"class{index}" for index in range(args.classes)),
        colors=tuple((20 * index % 256, index, 0) for index in range(args.classes)),
        values=tuple((index,) for index in range(args.classes)),
    )
    card = ModelCard(model=args.model, config=config, labels=spec, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_bundle(folder, create_model(args.model, **config), card)


def watch(process: "subprocess.Popen[str]", every_s: float = 0.02) -> int:
    """The peak of a process's resident memory in bytes, once it has ended."""
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
        time.sleep(every_s)
    process.wait()
    return peak


def children_s() -> float:
    """Seconds that finished processes have kept the cores busy."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def label(args: argparse.Namespace, run: Path, image: Path, out: Path) -> dict[str, Any]:
    """`pixelwise predict` on one image: what it said, took and needed."""
    code = "import sys; from pixelwise.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "predict", str(run), str(image), "--out", str(out)]
    command += ["--precision", args.precision, *args.options]
    started, worked = time.perf_counter(), children_s()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        peak = watch(process)
        reader.join()
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit("".join(said))
    line = next((text.strip() for text in said if _STATED.search(text)), "")
    found = _STATED.search(line)
    stated = int(float(found[1]) * (1 << 30 if found[2] == "GiB" else 1 << 20)) if found else None
    return {
        "said": line.removeprefix(f"{image}: "),
        "stated_bytes": stated,
        "peak_bytes": peak,
        "stated_over_peak": stated / peak if stated else None,
        "seconds": seconds,
        "cpu_seconds": children_s() - worked,
    }


def check(path: Path, size: int) -> None:
    """The labels are there, all of them, in tiles of a TIFF."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        assert page.shape == (size, size) and page.dtype == np.uint8, page
        assert len(page.databytecounts) == math.ceil(size / 512) ** 2 and all(page.databytecounts)


def one_size(args: argparse.Namespace, run: Path, size: int, folder: Path) -> dict[str, Any]:
    image, out = folder / f"scene{size}.tif", folder / f"labels{size}"
    started = time.perf_counter()
    write_image(image, size)
    file_bytes, written_s = image.stat().st_size, time.perf_counter() - started
    row = label(args, run, image, out)
    if not args.options:
        check(out / image.name, size)
    image.unlink()
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return {"file_bytes": file_bytes, "image_written_s": written_s, **row}


def show(size: int, row: dict[str, Any]) -> None:
    ratio = row["stated_over_peak"]
    close = ratio is not None and abs(ratio - 1) <= TOLERANCE
    print(
        f"{size:>6} px: peak {row['peak_bytes'] / 2**30:.3f} GiB, stated over peak "
        f"{'-' if ratio is None else f'{ratio:.2f}'}{'' if close else ' (!)'}, {row['seconds']:.0f} s "
        f"({row['cpu_seconds']:.0f} s of cores), "
        f"{size**2 / row['seconds'] / 1e6:.2f} Mpx/s · {row['said']}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4000, 8000, 16_000, 30_000])
    parser.add_argument("--model", default="unet")
    parser.add_argument(
        "--widths", type=int, nargs="*", default=[16, 32, 64, 128, 256], help="none: those of the model"
    )
    parser.add_argument("--config", default="{}", help="more fields of the model, as JSON")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "float32"])
    parser.add_argument("--folder", type=Path, default=None, help="where the images are written for the time being")
    parser.add_argument("--quick", action="store_true", help="2,000 and 3,000 px and a narrow network")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; without it there is none")
    args, args.options = parser.parse_known_args()
    if args.quick:
        args.sizes, args.widths = [2000, 3000], [4, 8]
    return args


def main() -> None:
    """Options that are not known here go to `pixelwise predict`, such as `--maps entropy`."""
    args = parse()
    rows: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_run(Path(folder) / "run", args)
        for size in sorted(args.sizes):
            rows[size] = one_size(args, Path(folder) / "run", size, Path(folder))
            show(size, rows[size])
    peaks = [row["peak_bytes"] for row in rows.values()]
    growth = peaks[-1] / peaks[0]
    print(
        f"memory at the largest over that at the smallest size: {growth:.2f}; all under 2 GiB: {max(peaks) < LIMIT_BYTES}"
    )
    if args.out is None:
        return
    import torch

    date = datetime.now(UTC).date().isoformat()
    result = {
        "date": date,
        "network": {"model": args.model, "widths": args.widths, "num_classes": args.classes, **json.loads(args.config)},
        "precision": args.precision,
        "options": args.options,
        "sizes": rows,
        "largest_over_smallest": growth,
        "versions": {"torch": torch.__version__, "tifffile": tifffile.__version__, "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
    }
    write_json(args.out / f"{date}-gigapixel.json", result)


if __name__ == "__main__":
    main()
