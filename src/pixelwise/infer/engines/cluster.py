"""A Ray cluster to work on: one that is there, or one of this machine alone, closed to others."""

import logging
import math
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.extras import extra

_MOST_CORES = 8  # of a worker
_CORES = 2  # of a worker without a GPU: one computes, one decodes and writes
_ANSWER_S = 5.0
_STORE_BYTES = 100 << 20  # jobs are small; the windows of blocks that come back are spilled to the disk beyond it
_ENVIRONMENT = {  # read when Ray is imported and when it starts
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing phones home
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # workers do the work; 15 by default, which a busy machine starves
}
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for nobody else


@dataclass(frozen=True)
class Cluster:
    """Ray, and what it has."""

    ray: ModuleType
    workers: int  # that hold the network
    cpus: float  # cores of each
    gpus: float  # of each; a share if several use one


@contextmanager
def started(address: str | None, workers: int | None, *, use_gpus: bool = True) -> Iterator[Cluster]:
    """Connect to a cluster, or start Ray on this machine for as long as it takes.

    Nothing is sent to Ray's makers, no dashboard is started, and what is started here listens on this machine alone. A Ray
    that was there before is left running.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None:
        _check_address(address)  # before Ray is imported, which settles where a Ray that is started here listens
    before = set(os.environ)
    for name, value in (_ENVIRONMENT | (_ALONE if address is None else {})).items():
        os.environ.setdefault(name, value)
    try:
        ray = extra("ray", "cluster", "--engine ray")
        is_ours = not ray.is_initialized()
        try:
            with warnings.catch_warnings():  # Ray warns of its own obsolete settings
                warnings.simplefilter("ignore")
                if is_ours:
                    _connect(ray, address, workers, use_gpus)
                cluster = _measured(ray, workers)
            yield cluster
        finally:
            if is_ours:
                ray.shutdown()
    finally:
        for name in {name for name in os.environ if name.startswith("RAY_")} - before:  # what Ray added too
            del os.environ[name]


def _check_address(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would try for a minute."""
    if "://" in address:
        raise UsageError(
            f"--address {address}: give HOST:PORT of the cluster's head (6379, not Ray's client), or auto on one of its "
            "machines. From elsewhere, submit the command: ray job submit -- pixelwise predict ..."
        )
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise PixelwiseError(f"--address {address}: it must be HOST:PORT, or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise _no_answer(address, error) from error


def _connect(ray: ModuleType, address: str | None, workers: int | None, use_gpus: bool) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {
            "num_cpus": max(os.cpu_count() or 1, workers or 1), "num_gpus": None if use_gpus else 0,
            "include_dashboard": False, "object_store_memory": _STORE_BYTES,
        }  # fmt: skip
    try:
        ray.init(address=address or "local", **options)  # without "local", it would join whatever Ray runs here
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if address is not None:
            raise _no_answer(address, error) from error
        raise PixelwiseError(f"engine ray: Ray cannot be started on this machine ({_line(error)}).") from error


def _no_answer(address: str, error: BaseException) -> PixelwiseError:
    return PixelwiseError(
        f"--address {address}: no Ray cluster answers there ({_line(error)}). Start one with `ray start --head`, or "
        "leave --address out to use this machine alone. One that asks for a token wants RAY_AUTH_MODE=token."
    )


def _measured(ray: ModuleType, workers: int | None) -> Cluster:
    """Shares of the cluster: a GPU for each worker, or two cores; of one machine no more than it has."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    graphics = sum(int(machine.get("GPU", 0)) for machine in machines)
    count = workers or graphics or max(1, sum(each // _CORES for each in cores))
    if graphics:
        gpus = 1.0 if count <= graphics else math.floor(1e4 * graphics / count) / 1e4
        holders = [machine for machine in machines if machine.get("GPU", 0)]
        share = min(machine.get("CPU", 0) / machine["GPU"] for machine in holders) * gpus
        return Cluster(ray, count, float(max(0, min(_MOST_CORES, math.floor(share)))), gpus)
    cpus = _CORES if sum(each // _CORES for each in cores) >= count else 1
    return Cluster(ray, min(count, max(1, sum(cores))), float(cpus), 0.0)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
