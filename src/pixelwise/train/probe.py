"""What a machine does best with a network, found out by timing before a training: precision, batch size, worker processes.

The times are kept in the user's cache folder by machine and network, so that the next run takes the same choice without the
wait. No choice depends on a clock where it would change the result for little: bfloat16 stays where it is about as fast.
"""

import statistics
from dataclasses import dataclass

import torch

from pixelwise.infer.devices import computes_in_bf16, resolve_precision
from pixelwise.machine import is_out_of_memory, memory_room
from pixelwise.train.config import RunConfig
from pixelwise.train.network import Start, window_px
from pixelwise.train.timing import Length, Seconds, faster, measured, standard_error

LARGEST_BATCH, GAIN = 32, 1.25  # of a GPU: doubled while crops take less time each by such a factor
EQUAL = 0.03  # fewer processes are taken where they cost less than this share of a step
NEXT_TO_NOTHING = 0.005  # none: on a busy machine a step looks longer than it is, and its crops cheaper


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was chosen, and why."""

    precision: str  # bf16 or float32
    batch_size: int  # crops in a step, per device
    step_s: float  # seconds of one step
    reasons: tuple[str, ...]  # each choice with the figures of its candidates, a line for each
    notes: tuple[str, ...]  # what the user should know even without asking


def probe_steps(
    config: RunConfig, start: Start, shape: tuple[int, int, int], device: torch.device, length: Length
) -> Probe:
    """Choose precision and batch size for crops of `shape` (N, C, side), by the times of training steps.

    Raises:
        RuntimeError, MemoryError: not even the smallest batch fits into memory, or the user's own does not.
    """
    precisions = candidates(config, device)
    wanted, channels, side = shape
    batch, notes = wanted, list[str]()
    while True:
        try:
            found, origin = measured(config, start, (batch, channels, side), device, precisions, length)
            break
        except (RuntimeError, MemoryError) as error:
            if config.batch_size or batch <= 2 or not is_out_of_memory(error):
                raise
        batch //= 2
    precision = faster(found)
    reason = _precision_reason(config, found, precision, device, origin)
    why = f"batch_size {batch}: " + ("given" if config.batch_size else "the default; another one would train otherwise")
    if batch < wanted:
        notes.append(f"batch_size={wanted} does not fit into memory, so it is {batch}{free_words(device)}.")
        why = f"batch_size {batch}: {wanted} does not fit into memory"
    elif device.type == "cuda" and config.minutes and not config.batch_size and window_px(start.model) is None:
        # A budget in time buys more crops; one in steps or epochs means as many steps as the user knows.
        tried = [f"{batch}: {1000 * min(map(statistics.median, found.values())) / batch:.2f} ms a crop"]
        while batch < LARGEST_BATCH and (
            more := _larger(config, start, (batch, channels, side), device, length, found)
        ):
            batch, found = 2 * batch, more
            tried.append(f"{batch}: {1000 * min(map(statistics.median, found.values())) / batch:.2f} ms a crop")
        why = f"batch_size {batch}: {', '.join(tried)}; doubled while crops take {GAIN} times less time each"
        if batch > wanted:
            notes.append(
                f"batch_size={batch}, since {wanted} crops leave this GPU idle; the learning rate is not changed."
            )
    step_s = statistics.median(found[precision])
    return Probe(precision=precision, batch_size=batch, step_s=step_s, reasons=(reason, why), notes=tuple(notes))


def candidates(config: RunConfig, device: torch.device) -> tuple[str, ...]:
    """The precisions to choose from, the one to prefer first."""
    preferred = resolve_precision(config.precision, device)
    return (preferred, "float32") if config.precision == "auto" and preferred == "bf16" else (preferred,)


def free_words(device: torch.device) -> str:
    """What limits the memory, for a message; nothing where that is not known."""
    room = memory_room() if device.type == "cpu" else None
    return f" ({room})" if room else ""


def _larger(
    config: RunConfig, start: Start, shape: tuple[int, int, int], device: torch.device, length: Length, found: Seconds
) -> Seconds | None:
    """The times of twice the batch, if it fits and its crops take clearly less time each."""
    batch, channels, side = shape
    precision = faster(found)
    try:
        more, _ = measured(config, start, (2 * batch, channels, side), device, (precision,), length)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    gain = 2 * statistics.median(found[precision]) / statistics.median(more[precision])
    return more if gain >= GAIN else None


def _precision_reason(config: RunConfig, found: Seconds, chosen: str, device: torch.device, origin: str) -> str:
    rows = [
        f"{name} {statistics.median(times):.3g} s a step (median of {len(times)}, ± {standard_error(times):.2g})"
        for name, times in found.items()
    ]
    if config.precision != "auto":
        why = "given"
    elif len(found) > 1:
        why = (
            "the fastest" if min(found, key=lambda name: statistics.median(found[name])) == chosen else "about as fast"
        )
    elif computes_in_bf16(device):
        why = "this hardware computes in it; float32 was not timed, since the training is short or a step long"
    else:
        why = "this hardware does not compute in bfloat16"
    return f"precision {chosen}: {why}; {', '.join(rows)}; {origin}"


def choose_workers(batch_s: float, step_s: float, *, cores: int | None, most: int) -> tuple[int, str]:
    """How many processes prepare crops, and why: the fewest with which a step takes (almost) the least time.

    Without any, a step waits for its crops. Several prepare them meanwhile, each a batch at a time; where the CPU computes
    the network too, they take their share of its cores from it.

    Args:
        batch_s: seconds of one core in which the crops of a step are prepared.
        step_s: seconds of a step that waits for nothing.
        cores: that both share, or None where a GPU computes.
        most: processes, at most.

    Example:
        >>> choose_workers(0.1, 0.4, cores=2, most=2)[0], choose_workers(1.0, 0.4, cores=2, most=2)[0]
        (1, 2)
    """
    shared_s = batch_s / cores if cores else 0.0
    expected = [step_s + batch_s, *(max(batch_s / count, step_s + shared_s) for count in range(1, most + 1))]
    allowed = (1 + NEXT_TO_NOTHING, *[1 + EQUAL] * most)
    chosen = next(count for count, seconds in enumerate(expected) if seconds <= allowed[count] * min(expected))
    rows = ", ".join(f"with {count} {seconds:.3g} s" for count, seconds in enumerate(expected))
    return chosen, (
        f"workers {chosen}: the crops of a step take {batch_s:.3g} s of one core, the step itself {step_s:.3g} s; "
        f"a step is expected to take {rows}; timed now"
    )
