"""The work of a batch as small rows of bytes: a handful of images, or one piece of a huge one; and what became of it."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixelwise.infer.engines.base import Job
from pixelwise.infer.engines.pieces import Piece
from pixelwise.infer.inputs import Location
from pixelwise.infer.tiling import Region

MOST_IMAGES = 64
"""Of a row, so that a million photos are some ten thousand rows."""

_ROWS_PER_WORKER = 8  # so that all workers end at about the same time


def packed(value: Any) -> bytes:
    """JSON, compressed: names of files in one folder are mostly the same text.

    Example:
        >>> unpacked(packed({"jobs": [1, "a.png"]}))
        {'jobs': [1, 'a.png']}
    """
    return zlib.compress(json.dumps(value).encode(), 1)


def unpacked(data: bytes) -> Any:
    """What `packed` was given."""
    return json.loads(zlib.decompress(data))


def rows_of_images(jobs: Sequence[tuple[int, Job]], workers: int, most: int = MOST_IMAGES) -> Iterator[dict[str, Any]]:
    """Rows of images that are labelled as a whole; each job comes with its number.

    Example:
        >>> jobs = [(number, Job(Path(f"{number}.png"), {})) for number in range(100)]
        >>> [len(unpacked(row["work"])["jobs"]) for row in rows_of_images(jobs, workers=2)][:3]
        [7, 7, 7]
    """
    count = max(1, min(most, -(-len(jobs) // (_ROWS_PER_WORKER * workers))))
    for start in range(0, len(jobs), count):
        entries = [[index, *_entry(job)] for index, job in jobs[start : start + count]]
        yield {"work": packed({"jobs": entries})}


def jobs_of(work: dict[str, Any]) -> list[tuple[int, Job]]:
    """The jobs of a row, with their numbers."""
    return [(index, _job(*entry)) for index, *entry in work["jobs"]]


def row_of_piece(index: int, job: Job, digest: str, number: int, piece: Piece) -> dict[str, Any]:
    """The row of one piece of image `index`, whose content has the fingerprint `digest`."""
    work = {"jobs": [[index, *_entry(job)]], "digest": digest, "piece": number, "place": asdict(piece)}
    return {"work": packed(work)}


def piece_of(work: dict[str, Any]) -> Piece:
    """The piece in a row."""
    return Piece(**work["place"] | {"region": Region(**work["place"]["region"])})


def _entry(job: Job) -> list[Any]:
    # Workers have other working directories, so paths are told in full.
    outputs = {kind: _told(place) for kind, place in job.outputs.items()}
    return [_told(job.path), outputs]


def _job(path: list[Any], outputs: dict[str, list[Any]]) -> Job:
    return Job(_location(*path), {kind: _location(*place) for kind, place in outputs.items()})


def _told(place: Location) -> list[Any]:
    return [True, str(place.absolute())] if isinstance(place, Path) else [False, place]


def _location(is_path: bool, text: str) -> Location:
    return Path(text) if is_path else text
