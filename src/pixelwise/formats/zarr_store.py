"""The store through which zarr-python reads: it shows one array of judged metadata, and judges each chunk."""

import asyncio
from functools import cache
from typing import Any

from pixelwise.files import extra
from pixelwise.formats.readers import silence
from pixelwise.formats.zarr_arrays import ArrayPlan
from pixelwise.formats.zarr_folders import Folder


def open_array(folder: Folder, path: str, plan: ArrayPlan) -> Any:
    """The array of zarr-python, which sees nothing but checked metadata and checked chunks.

    Args:
        folder: where it lies.
        path: of the array in the folder.
        plan: its checked metadata.
    """
    zarr = extra("zarr", "zarr", "Zarr")
    with silence():
        return zarr.open_array(store=_store_type()(folder, path, plan), mode="r", zarr_format=plan.zarr_format)


@cache
def _store_type() -> Any:
    """The class of stores that show zarr-python one judged array; made late, for zarr is optional."""
    import zarr
    from zarr.abc.store import Store

    class GuardedStore(Store):
        supports_writes = supports_deletes = supports_listing = supports_partial_writes = False

        def __init__(self, folder: Folder, path: str, plan: ArrayPlan) -> None:
            super().__init__(read_only=True)
            self.folder, self.path, self.plan = folder, path, plan

        def __eq__(self, other: object) -> bool:
            return self is other

        __hash__ = None  # type: ignore[assignment]

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            data = await asyncio.to_thread(_piece, self.folder, self.path, self.plan, key, byte_range)
            return None if data is None else prototype.buffer.from_bytes(data)

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
            return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

        async def exists(self, key: str) -> bool:
            return await self.get(key, zarr.core.buffer.default_buffer_prototype()) is not None

        async def set(self, key: str, value: Any) -> None:
            raise NotImplementedError

        async def delete(self, key: str) -> None:
            raise NotImplementedError

        async def list(self) -> Any:
            return
            yield

        async def list_prefix(self, prefix: str) -> Any:
            return
            yield

        async def list_dir(self, prefix: str) -> Any:
            return
            yield

    return GuardedStore


def _piece(folder: Folder, path: str, plan: ArrayPlan, key: str, part: Any) -> bytes | None:
    """The checked metadata, a checked chunk or shard, the index of a shard, or a checked chunk of it."""
    if key in (".zarray", "zarr.json"):
        return plan.document if (key == ".zarray") == (plan.zarr_format == 2) else None
    if key.rpartition("/")[2].startswith("."):
        return None
    key = f"{path}/{key}".lstrip("/")
    if part is None:
        most = plan.stored_bytes if not plan.shard else plan.shard * plan.stored_bytes + plan.index_bytes
        data = folder.read(key, 0, most + 1)
        if data is not None:
            (plan.check_shard if plan.shard else plan.check_chunk)(data)
        return data
    if hasattr(part, "suffix"):
        return folder.tail(key, min(part.suffix, plan.index_bytes))
    start, stop = part.start, min(part.end, part.start + plan.stored_bytes + plan.index_bytes)
    data = folder.read(key, start, stop)
    is_index = not plan.index_at_end and (start, part.end) == (0, plan.index_bytes)
    if data is not None and not is_index:
        plan.check_chunk(data)
    return data
