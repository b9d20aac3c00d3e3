"""The training data as an endless stream of batches that can be entered at any step.

What comes at a position of the stream depends on the seed and the position alone: the order of an epoch and the random
draws of each crop are seeded by them. So a resumed run sees the very same batches, whatever number of workers prepares them.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from pixelwise.data.check import Inspection
from pixelwise.data.labels import LabelSpec
from pixelwise.data.layouts import Pair
from pixelwise.data.samples import Sample, load_sample
from pixelwise.data.transforms import PixelWeight
from pixelwise.train.config import RunConfig
from pixelwise.train.inputs import input_transform
from pixelwise.train.plan import Plan, image_area
from pixelwise.train.separation import separate

Weigh = Callable[[Pair, Sample], tuple[Sample, Tensor]]  # a sample as it is trained on, and its pixels' weights (H, W)

CACHE_SHARE = 0.3  # of the machine's memory may hold decoded images


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts`, and is the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class CropSet(Dataset[tuple[Tensor, ...]]):
    """Augmented crops by (index of the pair, position in the stream): image, mask and, if asked for, pixel weights.

    Args:
        pairs: with masks.
        labels: what their values mean.
        channels: of the network's images.
        transform: from `training_transform`.
        seed: of the run.
        cache: keep the decoded images in memory (shared with the workers where processes fork), and their weights too.
        weigh: computes the weights of an image's pixels.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: LabelSpec,
        channels: int,
        transform: v2.Transform,
        seed: int,
        cache: bool,
        weigh: Weigh | None = None,
    ) -> None:
        self.pairs, self.labels, self.channels = pairs, labels, channels
        self.transform, self.seed, self.weigh = transform, seed, weigh
        self._samples: list[tuple[Tensor, ...]] | None = None
        if cache:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._samples = list(pool.map(self._load, range(len(pairs))))

    def _load(self, index: int) -> tuple[Tensor, ...]:
        pair = self.pairs[index]
        sample, weights = load_sample(pair, self.labels, self.channels), None
        if self.weigh is not None:
            sample, weights = self.weigh(pair, sample)
        given = (tv_tensors.Image(sample.image), tv_tensors.Mask(sample.mask))
        return given if weights is None else (*given, PixelWeight(weights))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        index, position = key
        sample = self._samples[index] if self._samples is not None else self._load(index)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that also prepares the seed of every GPU, which takes longer than cutting a window.
            torch.default_generator.manual_seed(seed_of(self.seed, "crop", position))
            drawn = self.transform(*sample)
        return tuple(item.as_subclass(Tensor) for item in drawn)


class BatchStream(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, position): one shuffled epoch after the other, from `first_step` on."""

    def __init__(
        self, images: int, *, batch_size: int, seed: int, first_step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.first_step, self.rank, self.world = first_step, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        position = (self.first_step * self.world + self.rank) * self.batch_size
        while True:
            batch = []
            for at in range(position, position + self.batch_size):
                if at // self.images != epoch:
                    epoch = at // self.images
                    generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
                    order = torch.randperm(self.images, generator=generator)
                batch.append((int(order[at % self.images]), at))
            yield batch
            position += self.batch_size * self.world


def make_loader(dataset: CropSet, stream: BatchStream, *, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Batches (images (B, C, s, s) float32 in unit scale, masks (B, s, s) uint8, weights (B, s, s) if there are any).

    They are prepared ahead by `workers` processes.
    """
    ahead: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_the_end_to_the_parent,
        **ahead,
    )


def _leave_the_end_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the workers must live on until the checkpoint is written.

    A parent that ends then hangs up on batches that are just handed over, which multiprocessing would print as a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _print_unless_hung_up


def _print_unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def fits_in_cache(images_bytes: int) -> bool:
    """Whether decoded images of this size may be kept in memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return images_bytes < 1 << 30  # a machine that does not tell its memory gets a cautious gigabyte
    return images_bytes < CACHE_SHARE * memory


def make_dataset(config: RunConfig, plan: Plan, inspection: Inspection, model: nn.Module) -> CropSet:
    """What the steps draw from; the images are read here if they fit into memory."""
    folder = inspection.folder
    pairs = folder.split("train")
    is_uint8 = set(inspection.dtypes) == {"uint8"}
    transform = input_transform(config, model, crop_px=plan.crop_px, fill=plan.mean, is_uint8=is_uint8)
    pixels = sum(count * image_area(size) for size, count in inspection.sizes.items())
    share = len(pairs) / max(1, sum(inspection.sizes.values()))
    bytes_of_pixel = inspection.channels * (1 if is_uint8 else 4) + 1 + (4 if config.separation else 0)
    cache = fits_in_cache(int(pixels * share * bytes_of_pixel))
    weigh = None
    if config.separation:
        weigh = partial(separate, w0=config.separation, sigma_px=config.separation_sigma_px)
    return CropSet(pairs, folder.labels, inspection.channels, transform, config.seed, cache, weigh)


def make_stream(config: RunConfig, plan: Plan, dataset: CropSet, first_step: int) -> Any:
    """The loader of endless batches, entered at `first_step`."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    stream = BatchStream(
        len(dataset),
        batch_size=plan.batch_size,
        seed=config.seed,
        first_step=first_step,
        rank=rank,
        world=config.devices,
    )
    return make_loader(dataset, stream, workers=plan.workers, pin_memory=plan.device.startswith("cuda"))
