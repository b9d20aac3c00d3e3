"""The progress of a training run: a live bar on a terminal, a line a minute in a log."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pixelwise.cli.options import for_terminal
from pixelwise.train.plan import SLOW

LINE_EVERY_S = 60.0
MEASURED = 0.1  # share of the budget from which on its pace is known


class TrainingProgress:
    """Shows loss, mIoU, images/s and the time left from the dictionaries that `train` reports."""

    def __init__(self, console: Console) -> None:
        self.console, self.values, self._line_at = console, dict[str, Any](), time.monotonic()
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, event: dict[str, Any]) -> None:
        """Update the display with new values."""
        self.values |= event
        if "validated" in event:
            headline, best = event["headline"], event["best"]
            kept = "undefined" if best < 0 else f"{100 * best:.2f}"
            self._say(f"step {event['validated']:,}: validation {headline.text}; kept weights: {headline.name} {kept}")
            if event["note"] and event["note"] not in self._told:
                self._told.add(event["note"])
                self._say(event["note"])
        if "step" not in event:
            return
        if self._task is None:  # the bar starts with training, below the plan
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, step=0, text="")
        expected, planned = event["expected_steps"], event["planned_steps"]
        if event["spent"] > MEASURED and expected < SLOW * planned and "pace" not in self._told:
            self._told.add("pace")
            self._say(
                f"step {event['step']:,}: slower than planned, about {expected:,} of {planned:,} steps in this time"
            )
        self._bar.update(self._task, completed=event["spent"], step=event["step"], text=self._text())
        if not self.console.is_terminal and time.monotonic() - self._line_at >= LINE_EVERY_S:
            self._line_at = time.monotonic()
            self.console.print(f"step {event['step']:,} ({100 * event['spent']:.0f} %): {self._text()}")

    def _say(self, text: str) -> None:
        """A line; names of classes are no markup."""
        self.console.print(for_terminal(text), markup=False, highlight=False, soft_wrap=True)

    def _text(self) -> str:
        """Loss, mIoU, speed and time left, as far as they are known."""
        values = self.values
        texts = [f"loss {values['mean_loss']:.3f}"] if "mean_loss" in values else []
        texts += [f"mIoU {100 * values['miou']:.1f}"] if "miou" in values else []
        texts += [f"{values['images_per_s']:.1f} images/s"] if "images_per_s" in values else []
        if values["spent"] > 0.01:
            left = values["elapsed_s"] * (1 - values["spent"]) / values["spent"]
            texts.append(f"{left / 60:.1f} min left")
        return ", ".join(texts)
