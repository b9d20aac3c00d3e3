"""What prediction is made of, in one place: who opens images, finds the way to score them, decides, and writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pixelwise.formats import Source, SourceInfo, open_source
from pixelwise.formats.sinks import Writer, choose_writer
from pixelwise.infer.decide import Decision
from pixelwise.infer.options import JobOptions
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tiling import Scorer
from pixelwise.infer.tiling.options import Tiling

Open = Callable[..., Source]
ChooseWriter = Callable[[SourceInfo, str, str | None, Mapping[str, Any]], tuple[str, Writer]]
"""(image, kind, wanted format or None, metadata) -> the suffix of the output, and what writes it."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The functions that a job calls; `standard()` gives those of the package.

    Attributes:
        open_source: (location, **reading) -> Source.
        choose_scorer: (predictor, height, width, tiling, note) -> Scorer.
        choose_writer: (info, kind, format or None, metadata) -> (suffix, writer).
        decision: (predictor, options) -> (scores, valid) -> arrays by kind.
    """

    open_source: Open
    choose_scorer: Callable[..., Any]
    choose_writer: ChooseWriter
    decision: Callable[[Predictor, JobOptions], Callable[..., Any]]

    @classmethod
    def standard(cls) -> "Tools":
        """Those of the package."""
        return cls(
            open_source=open_source, choose_scorer=_choose_scorer, choose_writer=choose_writer, decision=Decision.of
        )


def _choose_scorer(
    predictor: Predictor, height: int, width: int, tiling: Tiling, note: Callable[[str], None]
) -> Scorer:
    """The search for the best way is imported when an image is large enough to need it."""
    from pixelwise.infer.tiling.plan import choose_scorer

    return choose_scorer(predictor, height, width, tiling, note)
