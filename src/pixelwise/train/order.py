"""The order in which training images are drawn: endless, shuffled by epochs, entered at any step."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts`, and is the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class BatchStream(Sampler[list[tuple[int, ...]]]):
    """Endless batches of (index, position): one shuffled epoch after the other, from `first_step` on.

    Those of a step for which `is_warm` is true are (index, position, True). The process that trains asks, not its workers.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        is_warm: Callable[[int], bool] | None = None,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.first_step, self.rank, self.world, self.is_warm = first_step, rank, world, is_warm

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, order, step = -1, torch.empty(0), self.first_step
        position = (self.first_step * self.world + self.rank) * self.batch_size
        while True:
            batch, more = list[tuple[int, ...]](), (True,) * (self.is_warm is not None and self.is_warm(step))
            for at in range(position, position + self.batch_size):
                if at // self.images != epoch:
                    epoch = at // self.images
                    generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
                    order = torch.randperm(self.images, generator=generator)
                batch.append((int(order[at % self.images]), at, *more))
            yield batch
            step += 1
            position += self.batch_size * self.world
