"""Parts of one image from many machines, where these share no disk: they meet beside the results in the object store."""

from pathlib import Path, PurePosixPath

from pixelwise.files import atomic_path
from pixelwise.formats.remote import exists, filesystem, publish, remote_errors, shown
from pixelwise.infer.inputs import Location
from pixelwise.infer.outfolder import RECORDS
from pixelwise.infer.parts import Parts
from pixelwise.infer.tiling import Region


class SharedParts:
    """The parts of one image in the object store; nothing is to do where the results lie on a disk that all see.

    Args:
        out: the folder of the results.
        folder: where the parts of this image lie on this machine; its name tells the settings.

    Example:
        >>> SharedParts("memory://labels", Path("cache/.a.tif.parts-0123")).url
        'memory://labels/.pixelwise/parts/.a.tif.parts-0123'
        >>> SharedParts(Path("labels"), Path("labels/.a.tif.parts-0123")).url is None
        True
    """

    def __init__(self, out: Location, folder: Path) -> None:
        self.folder = folder
        self.url = None if isinstance(out, Path) else f"{out}/{RECORDS}/parts/{folder.name}"

    def fetch(self, parts: Parts, near: tuple[int, Region] | None = None) -> None:
        """Take the parts of all machines (or those that touch a rectangle of a plane) into the local folder.

        Raises:
            DataError: the server cannot be asked.
        """
        if self.url is None:
            return
        system, root = filesystem(self.url)
        with remote_errors(shown(self.url)):
            names = [PurePosixPath(str(item)).name for item in system.find(root)] if system.exists(root) else []
            for name in names:
                if parts.holds(name, near) and not (self.folder / name).exists():
                    with atomic_path(self.folder / name) as part:
                        system.get_file(f"{root}/{name}", str(part))
        parts.scan()

    def send(self, parts: Parts, near: tuple[int, Region] | None = None) -> None:
        """Give the finished parts (or those that touch a rectangle of a plane) to all, and forget them here.

        Raises:
            PixelwiseError: they cannot be sent.
        """
        if self.url is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if parts.holds(path.name, near):
                if not exists(f"{self.url}/{path.name}"):
                    publish(path, f"{self.url}/{path.name}")
                path.unlink()

    def remove(self) -> None:
        """Delete them, when the outputs are in place.

        Raises:
            DataError: the server does not allow it.
        """
        if self.url is not None and exists(self.url):
            system, root = filesystem(self.url)
            with remote_errors(shown(self.url)):
                system.rm(root, recursive=True)
