"""The training data as an endless stream of batches that can be entered at any step.

What comes at a position of the stream depends on the seed and the position alone: the order of an epoch and the random
draws of each crop are seeded by them. So a resumed run sees the very same batches, whatever number of workers prepares them.
"""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from pixelwise.data.check import Inspection
from pixelwise.data.copy_paste import Objects
from pixelwise.data.layouts import Pair
from pixelwise.data.photometric import Photometric, packed, with_validity
from pixelwise.data.places import ClassPlaces
from pixelwise.data.samples import OpenPair, OpenPairs, Sample, are_pictures, files_of, load_sample
from pixelwise.data.scan import in_threads
from pixelwise.data.separation import separate
from pixelwise.data.transforms import PixelWeight, Windowed, training_transform, window_transform
from pixelwise.errors import DataError, UsageError
from pixelwise.formats.local import printable
from pixelwise.machine import is_out_of_memory, memory_room, shared_memory_room
from pixelwise.train.config import RunConfig
from pixelwise.train.network import window_px
from pixelwise.train.order import BatchStream, seed_of
from pixelwise.train.plan import AHEAD, Plan, epoch_pairs

Weigh = Callable[[Pair, Sample], tuple[Sample, Tensor]]  # a sample as it is trained on, and its pixels' weights (H, W)

CACHE_SHARE = 0.4  # of the memory that is free may hold decoded images


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None of a folder, and where there is nothing, of which its reader has its own words."""
    try:
        status = path.stat()
    except OSError:
        return None
    return None if stat.S_ISDIR(status.st_mode) else (status.st_mtime_ns, status.st_size, status.st_ino)


class CropSet(Dataset[tuple[Tensor, ...]]):
    """Crops by (index of the pair, position in the stream): image, changes of its colours, mask, weights if asked for.

    A third part of such a key, if it is there and true, asks for a crop of the first half of the budget.

    Args:
        inspection: of the data; its training images are drawn from, volumes plane by plane, large planes by windows.
        crop_px: side of the crops.
        transform: makes a crop of an image and its mask, as `training_transform` does.
        photometric: draws the changes of colours.
        warm: as `transform`, for smaller crops.
        copy_paste: share of the crops into which an object is pasted.
        seed: of the run.
        cache: keep the decoded images in memory (shared with the workers where processes fork), and their weights too.
        weigh: computes the weights of an image's pixels.
    """

    def __init__(
        self,
        inspection: Inspection,
        crop_px: int,
        transform: v2.Transform,
        photometric: Photometric,
        *,
        seed: int,
        cache: bool,
        weigh: Weigh | None = None,
        warm: v2.Transform | None = None,
        copy_paste: float = 0.0,
    ) -> None:
        self.pairs, self.reading = epoch_pairs(inspection, crop_px), inspection.reading
        self.transform, self.photometric, self.seed, self.weigh = transform, photometric, seed, weigh
        self.warm = warm
        labels, self.channels, self.is_uint8 = inspection.folder.labels, inspection.channels, is_uint8(inspection)
        pixel_bytes = (1 if self.is_uint8 else 4) * (inspection.channels + 1)
        self.crop_bytes = crop_px**2 * (pixel_bytes + (1 if weigh is None else 5))
        self._places = {key: ClassPlaces(found, labels) for key, found in inspection.places().items()}
        how: dict[str, Any] = {"labels": labels, "channels": inspection.channels, "reading": self.reading}
        self._objects = Objects(copy_paste, *self._rare(inspection)) if copy_paste else None
        self._read: Callable[[Pair], Sample] = partial(load_sample, **how)
        self._opened = OpenPairs(partial(OpenPair, **how))
        self._states = {path: _state(path) for pair in self.pairs for path in files_of(pair)}
        self._samples: dict[int, tuple[Tensor, ...]] = {}
        if cache:
            whole = [index for index, pair in enumerate(self.pairs) if (pair.mask, pair.plane or 0) not in self._places]
            try:
                self._samples = dict(zip(whole, in_threads(self._load, whole), strict=True))
            except (MemoryError, RuntimeError) as error:  # each is read when it is drawn, then
                if not is_out_of_memory(error):
                    raise
        self.close()  # the workers open their own

    def close(self) -> None:
        """Close the files that crops were read from."""
        self._opened.close()

    def _rare(self, inspection: Inspection) -> tuple[tuple[int, ...], list[list[int]]]:
        """The pixels of each class, and which images show it and are read as a whole."""
        labels = inspection.folder.labels
        scans = {(scan.pair.image, scan.pair.mask): scan for scan in inspection.scans}
        images_of: list[list[int]] = [[] for _ in range(labels.num_classes)]
        for index, pair in enumerate(self.pairs):
            found = scans[pair.image, pair.mask].mask
            if found is None or (pair.mask, pair.plane or 0) in self._places:
                continue
            for label in {labels.class_of(value) for value in found.counts}:
                if label is not None and label < labels.num_classes:
                    images_of[label].append(index)
        return inspection.splits["train"].pixels, images_of

    def _load(self, index: int) -> tuple[Any, ...]:
        """The sample as tensors, or as `Windowed` images where it is read by windows."""
        pair, plane = self.pairs[index], self.pairs[index].plane or 0
        if (places := self._places.get((pair.mask, plane))) is not None:
            return self._windowed(self._opened.get(pair), plane, places)
        # Plain pictures are decoded as a whole, so keeping them open would keep their pixels.
        is_plain = are_pictures(pair) and not self.reading
        sample = self._read(pair) if is_plain else self._opened.get(pair).read(plane)
        for path in files_of(pair):
            if self._states[path] not in (None, _state(path)):
                raise DataError(
                    f"{printable(path)}: was replaced or changed since the training began (its time or size differs)."
                )
        weights = None
        if self.weigh is not None:
            sample, weights = self.weigh(pair, sample)
        given = (self._image(pair, sample.image, sample.valid), tv_tensors.Mask(sample.mask))
        return given if weights is None else (*given, PixelWeight(weights))

    def _image(self, pair: Pair, image: Tensor, valid: Tensor | None) -> tv_tensors.Image:
        """As crops are cut from it: all of one type, and channels last in memory, which is resampled faster."""
        if self.is_uint8 and image.dtype != torch.uint8:
            raise DataError(f"{printable(pair.image)}: holds numbers of another type than when the data were checked.")
        if not self.is_uint8:
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        marked = with_validity(image, valid)
        return tv_tensors.Image(marked.permute(1, 2, 0).contiguous().permute(2, 0, 1))

    def _windowed(self, opened: OpenPair, plane: int, places: ClassPlaces) -> tuple[Windowed, Windowed]:
        if self.weigh is not None:
            raise UsageError(
                f"separation: {opened.pair.image} is too large for it, since the distances are measured in whole images. "
                "Cut it into images of at most 16 million pixels, or leave separation out."
            )
        shape = opened.image.info.height, opened.image.info.width

        def read_image(top: int, left: int, height: int, width: int) -> Tensor:
            window = (top, left, height, width, plane)
            return self._image(opened.pair, opened.read_image(*window), opened.read_valid(*window))

        def read_mask(top: int, left: int, height: int, width: int) -> Tensor:
            return tv_tensors.Mask(opened.read_mask(top, left, height, width, plane))

        return Windowed(shape, read_image), Windowed(shape, read_mask, partial(places.draw, read_mask))

    def __len__(self) -> int:
        return len(self.pairs)

    def _sample(self, index: int) -> tuple[Any, ...]:
        return self._samples.get(index) or self._load(index)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, ...]:
        index, position, *is_warm = key
        sample, transform = self._sample(index), self.warm if self.warm and any(is_warm) else self.transform
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that also prepares the seed of every GPU, which takes longer than cutting a window.
            torch.default_generator.manual_seed(seed_of(self.seed, "crop", position))
            found = self._objects.draw(self._sample) if self._objects else None
            given = sample if found is None else (*sample, found)
            image, *masks = (item.as_subclass(Tensor) for item in transform(*given))
            return packed(image, self.channels), self.photometric.draw(), *masks


class TimedLoader(DataLoader[Any]):
    """A loader that knows how long it was waited for.

    Attributes:
        waited_s: seconds in all until batches were there; where no other process prepares them, those of preparing.
    """

    waited_s = 0.0

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.waited_s += time.perf_counter() - started
            yield batch


def make_loader(dataset: CropSet, stream: BatchStream, *, workers: int, pin_memory: bool) -> TimedLoader:
    """Batches: images (B, s, s, C) as they are stored, changes of their colours, masks (B, s, s) uint8, weights if any.

    `network_input` makes of the first two what the network sees. Where any image has pixels without data, all have a channel
    of validity. Batches are prepared ahead by `workers` processes, and handed over in shared memory; where that is small
    (64 MiB in a container of Docker's), as NumPy arrays through pipes.
    """
    ahead: dict[str, Any] = {"prefetch_factor": AHEAD, "persistent_workers": True} if workers else {}
    room, ahead_bytes = (
        shared_memory_room(),
        2 * workers * AHEAD * stream.batch_size * stream.world * dataset.crop_bytes,
    )
    return TimedLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_the_end_to_the_parent,
        collate_fn=partial(_batch, in_arrays=room is not None and ahead_bytes > room.bytes),
        **ahead,
    )


def _batch(crops: list[tuple[Tensor, ...]], *, in_arrays: bool) -> Sequence[Tensor] | Sequence[NDArray[Any]]:
    """Crops stacked; without a tensor where shared memory is small, since torch puts those of a worker into it."""
    channels = {crop[0].shape[-1] for crop in crops}
    if len(channels) > 1:  # some have data everywhere
        crops = [(_widened(image, max(channels)), *others) for image, *others in crops]
    if in_arrays:
        return tuple(np.stack([item.numpy() for item in column]) for column in zip(*crops, strict=True))
    return default_collate(crops)


def _widened(image: Tensor, channels: int) -> Tensor:
    """(H, W, C) with a last channel that says that there are data everywhere, if it has none."""
    return functional.pad(image, (0, channels - image.shape[-1]), value=1)


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
    """Whether decoded images of this size may be kept in memory; a machine that does not tell gets a cautious gigabyte."""
    room = memory_room()
    return images_bytes < (1 << 30 if room is None else CACHE_SHARE * room.bytes)


def is_uint8(inspection: Inspection) -> bool:
    """Whether images are cut and handed over as bytes; if only some are, all become float32 in unit scale."""
    return set(inspection.dtypes) == {"uint8"}


def make_dataset(config: RunConfig, plan: Plan, inspection: Inspection, model: nn.Module) -> CropSet:
    """What the steps draw from; the images are read here if they fit into memory."""
    # Colours change about the data's own mean; weights from elsewhere bring a normalisation of their own (`plan.mean`).
    changes = Photometric(
        config.photometric,
        inspection.mean,
        inspection.std,
        seen_mean=plan.mean,
        seen_std=plan.std,
        is_uint8=is_uint8(inspection),
    )

    def crops_of(side: int) -> v2.Transform:
        return training_transform(
            crop_px=side,
            scale=config.scale,
            focus=config.focus,
            flips=config.flips,
            fill=plan.mean,
            is_uint8=is_uint8(inspection),
            elastic=config.elastic,
            pastes=config.copy_paste > 0,
        )

    if window_px(model) is None:
        transform = crops_of(plan.crop_px)
    else:
        transform = window_transform(window_px=plan.crop_px, flips=config.flips)
    large = inspection.places()
    bytes_of_pixel = inspection.channels * (1 if is_uint8(inspection) else 4) + 1 + (4 if config.separation else 0)
    pixels = sum(
        scan.image.grid.pixels
        for scan in inspection.scans
        if scan.pair.split == "train" and scan.image and (scan.pair.mask, 0) not in large
    )
    weigh = None
    if config.separation:
        weigh = partial(separate, w0=config.separation, sigma_px=config.separation_sigma_px, reading=inspection.reading)
    cache = fits_in_cache(pixels * bytes_of_pixel * config.devices)  # each process has its own
    return CropSet(
        inspection,
        plan.crop_px,
        transform,
        changes,
        seed=config.seed,
        cache=cache,
        weigh=weigh,
        warm=crops_of(plan.warm_px) if plan.warm_px else None,
        copy_paste=config.copy_paste,
    )


def make_stream(
    config: RunConfig, plan: Plan, dataset: CropSet, first_step: int, spent: Callable[[], float]
) -> TimedLoader:
    """The loader of endless batches, entered at `first_step`; `spent` tells the share of the budget that is behind us.

    Smaller crops end with the first half of the planned steps; of a time, with the batch that is begun after its half, which
    comes a few steps later, for batches are prepared ahead.
    """

    def is_warm(step: int) -> bool:
        return (bool(config.minutes) or 2 * step < plan.steps) and spent() < 0.5

    ranks = {"rank": int(os.environ.get("LOCAL_RANK", 0)), "world": config.devices}
    stream = BatchStream(
        len(dataset),
        batch_size=plan.batch_size,
        seed=config.seed,
        first_step=first_step,
        is_warm=is_warm if plan.warm_px else None,
        **ranks,
    )
    return make_loader(dataset, stream, workers=plan.workers, pin_memory=plan.device.startswith("cuda"))
