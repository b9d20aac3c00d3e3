"""Which pieces of huge images are finished, kept in one place of a cluster."""


def _ledger() -> type:
    """The class; made in a function, it travels as it is, so the process that runs it need not import all of pixelwise."""

    class Ledger:
        """Which pieces of the huge images are there; who brings the last one joins them, and nobody else.

        Args:
            pieces: how many each image has, by its number.
        """

        def __init__(self, pieces: dict[int, int]) -> None:
            self._left = {index: set(range(count)) for index, count in pieces.items()}
            self._last: dict[int, int] = {}
            self._closed: set[int] = set()

        def add(self, index: int, piece: int) -> bool:
            """Note a finished piece; whether who brings it is to join all. It may come again, from a second worker."""
            left = self._left.get(index)
            if left is None:
                return False
            left.discard(piece)
            return not left and self._last.setdefault(index, piece) == piece

        def close(self, index: int) -> None:
            """Note that an image is joined."""
            self._closed.add(index)

        def is_closed(self, index: int) -> bool:
            """Whether an image is joined, so that none of its pieces is needed any more."""
            return index in self._closed

    return Ledger


Ledger = _ledger()
"""The ledger of a job.

Example:
    >>> ledger = Ledger({0: 2})
    >>> ledger.add(0, 1), ledger.add(0, 0), ledger.add(0, 1), ledger.add(0, 0)
    (False, True, False, True)
    >>> ledger.close(0)
    >>> ledger.is_closed(0)
    True
"""
