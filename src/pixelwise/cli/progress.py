"""The progress of a training run: a live bar on a terminal, a line a minute in a log."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pixelwise.cli.options import for_terminal
from pixelwise.train.plan import SLOW, SLOWER

LINE_EVERY_S = 60.0
MEASURED = 0.1  # share of the budget from which on its pace is known
WORTH_S = 60.0  # less time left than this is not worth a line
SHOWN = 0.95  # less than this share of the planned steps is in each line


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
        self._tell_pace(event)
        self._bar.update(self._task, completed=event["spent"], step=event["step"], text=self._text())
        if not self.console.is_terminal and time.monotonic() - self._line_at >= LINE_EVERY_S:
            self._line_at = time.monotonic()
            self.console.print(f"step {event['step']:,} ({100 * event['spent']:.0f} %): {self._text()}")

    def _tell_pace(self, event: dict[str, Any]) -> None:
        """Say once that the machine is slower than the plan: by the pace of the last steps, or by all so far."""
        expected, planned, step_s = event["expected_steps"], event["planned_steps"], event["step_s"]
        is_slow = step_s is not None and step_s > SLOWER * event["planned_step_s"]
        is_slow = is_slow and (expected < planned or event["left_s"] > WORTH_S)
        if "pace" in self._told or not (is_slow or (event["spent"] > MEASURED and expected < SLOW * planned)):
            return
        self._told.add("pace")
        how = f" ({step_s:.2g} s a step, {event['planned_step_s']:.2g} s in the plan)" if is_slow else ""
        what = f"about {expected:,} of {planned:,} steps in this time"
        if expected >= planned:
            what = f"about {event['left_s'] / 60:.1f} min left"
        self._say(f"step {event['step']:,}: slower than planned, {what}{how}")

    def _say(self, text: str) -> None:
        """A line; names of classes are no markup."""
        self.console.print(for_terminal(text), markup=False, highlight=False, soft_wrap=True)

    def _text(self) -> str:
        """Loss, mIoU, speed and time left, as far as they are known."""
        values = self.values
        texts = [f"loss {values['mean_loss']:.3f}"] if "mean_loss" in values else []
        texts += [f"mIoU {100 * values['miou']:.1f}"] if "miou" in values else []
        texts += [f"{values['images_per_s']:.1f} images/s"] if "images_per_s" in values else []
        if values["expected_steps"] < SHOWN * values["planned_steps"]:
            texts.append(f"{values['expected_steps']:,} of {values['planned_steps']:,} steps expected")
        if values["spent"] > 0.01:
            texts.append(f"{values['left_s'] / 60:.1f} min left")
        return ", ".join(texts)
