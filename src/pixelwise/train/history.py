"""`metrics.csv`: one row per logged step or validation, readable while the run goes on and after any interruption."""

import csv
import io
from pathlib import Path
from typing import Any

from pixelwise.files import write_text

COLUMNS = (
    "step", "epoch", "elapsed_s", "lr", "train_loss", "images_per_s", "val_miou", "val_global_accuracy",
)  # fmt: skip


class History:
    """Appends rows to a CSV file; rows after `first_step`, of a part of the run that is done again, are dropped first."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        kept = [row for row in read_history(path) if int(row["step"]) <= first_step] if first_step else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())

    def add(self, **row: Any) -> None:
        """One row; numbers are rounded to six digits."""
        values = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(values)


def read_history(path: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv`; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a number that was cut off would pass for a shorter one
    rows = [row for row in csv.DictReader(io.StringIO(whole)) if None not in row and None not in row.values()]
    return [row for row in rows if str(row.get("step", "")).isdigit()]
