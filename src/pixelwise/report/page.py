"""The report of a run: one HTML file that needs nothing else, no network and no script."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import pixelwise
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import write_bytes
from pixelwise.report import formatting, sections
from pixelwise.report.pictures import ERROR_RGB, read_examples
from pixelwise.report.run_folder import (
    Classes,
    DataFile,
    check_run,
    read_classes,
    read_mapping,
    read_metrics,
    read_model,
)
from pixelwise.report.sections import Evaluated, section

REPORT_NAME = "report.html"


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run as one self-contained HTML file.

    A section whose file is missing or damaged says so in one sentence. The same run folder gives the same bytes.

    Args:
        run: a run folder that `pixelwise train` wrote.
        out: the file to write; by default `report.html` in the run folder.

    Returns:
        The path of the file.

    Raises:
        DataError: `run` is not a run folder.
        UsageError: `out` is a folder.
        PixelwiseError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> _ = (run / "metrics.csv").write_text("step,train_loss\\n1,2.3\\n2,1.9\\n")
        >>> write_report(run).name
        'report.html'
    """
    run = Path(run)
    check_run(run)
    target = run / REPORT_NAME if out is None else Path(out)
    if target.is_dir():
        raise UsageError(f"{target}: is a folder. Give the name of a file, such as {target / REPORT_NAME}.")
    html = render_report(run)
    try:
        # File names may hold bytes that are not valid text: they are shown as question marks.
        write_bytes(target, html.encode("utf-8", "replace"))
    except OSError as error:
        raise PixelwiseError(f"{target}: the report cannot be written ({error.strerror or error}).") from error
    return target


def render_report(run: Path) -> str:
    """The HTML text of the report of a run folder."""
    # Names of classes and files are not trusted: everything is escaped except what the filter `svg` passes.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": formatting.percent,
        "share": formatting.share,
        "count": formatting.count,
        "plural": formatting.plural,
        "css": lambda color: "#{:02x}{:02x}{:02x}".format(*color),
        "svg": Markup,  # the output of figures.py, which holds no text of the user
    }
    return environment.get_template("report.html.j2").render(_context(run))


def _context(run: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    evaluations, broken = sections.read_evaluations(run)
    first = evaluations[0] if evaluations else None
    classes = read_classes(run, first.file.names if first else ())
    data = section(read_model, run, "data.json", DataFile)
    context: dict[str, Any] = {
        "title": run.resolve().name or "run",
        "version": pixelwise.__version__,
        "network": _network(run),
        "evaluations": evaluations,
        "broken": broken,
        "first": first,
        "validation": sections.best_validation((section(read_metrics, run).content or {}).get("val_miou", [])),
        "curves": section(sections.training_curves, run),
        "data": data,
        "data_facts": sections.data_facts(data.content) if data.content else [],
        "data_classes": classes.fit(data.content.num_classes) if data.content else classes,
        "plan": section(sections.plan_facts, run, with_data=data.content is None),
        "config": section(sections.config_facts, run),
        "environment": section(sections.environment, run),
    }
    return context | (_results(run, first, classes) if first else {})


def _network(run: Path) -> str:
    """The network's name, empty if the run does not tell."""
    found = (section(read_mapping, run, name).content or {} for name in ("model.json", "plan.json"))
    return next((values["model"] for values in found if isinstance(values.get("model"), str)), "")


def _results(run: Path, first: Evaluated, classes: Classes) -> dict[str, Any]:
    """What the sections on the first evaluation show."""
    known = classes.fit(len(first.file.matrix))
    scores = first.scores
    return {
        "classes": known,
        "error_color": ERROR_RGB,
        "undefined": any(map(math.isnan, scores.precision + scores.recall)),
        "confusions": sections.largest_confusions(first.file.matrix),
        "image_scores": section(sections.image_scores, first.file),
        "examples": section(read_examples, run, first.file, known),
    }
