"""Files behind URLs through fsspec: which are followed, reading them in ranges, copies, lists, and results put there."""

from pixelwise.formats.remote.objects import (
    RemoteStamp,
    fingerprint,
    list_folder,
    list_images,
    localise,
    opener,
    read_range,
)
from pixelwise.formats.remote.upload import check_writable, exists, publish, read_small, write_small
from pixelwise.formats.remote.urls import (
    NoSuchObject,
    bounded,
    check_package,
    filesystem,
    is_url,
    is_web,
    local_path,
    protocol_of,
    remote_errors,
    shown,
)

__all__ = [
    "NoSuchObject", "RemoteStamp", "bounded", "check_package", "check_writable", "exists", "filesystem",
    "fingerprint", "is_url", "is_web", "list_folder", "list_images", "local_path", "localise", "opener", "protocol_of",
    "publish", "read_range", "read_small", "remote_errors", "shown", "write_small",
]  # fmt: skip
