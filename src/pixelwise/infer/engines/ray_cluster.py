"""A Ray cluster to work on: one that is there, or one of this machine alone, quiet and closed to others."""

import importlib
import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.files import extra
from pixelwise.infer.engines.local import MOST_THREADS

_ENVIRONMENT = {  # read when Ray is imported and when it starts
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing phones home
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its own log stays off the terminal
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # how GPUs are hidden from those that have none, without a warning
    "RAY_worker_niceness": "0",  # workers do the work; 15 by default, which a busy machine starves
}
_ALONE = {  # of a Ray that is started here
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: listen on 127.0.0.1, not on all addresses
    # By this Ray refuses the other users of the machine. It would else write one into the home folder; it is read once.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with empty settings
_SETTINGS = 4  # the kind of frame that every gRPC server answers with
_STORE_BYTES = 100 << 20  # rows and outcomes are small
_ANSWER_S = 5.0  # within which the head of a cluster takes a connection
_CORES = 2  # of a worker without a GPU: one computes, one decodes and writes
_INIT_DEATHS = 3  # one after the other, before it is no accident


@dataclass(frozen=True)
class Cluster:
    """Ray, and what it has.

    Attributes:
        ray: the package.
        workers: how many hold the network.
        cpus: cores of each.
        gpus: of each; a share if several use one.
        is_ours: whether the connection ends with the work.
    """

    ray: ModuleType
    workers: int
    cpus: float
    gpus: float
    is_ours: bool = True


@contextmanager
def started(address: str | None, workers: int | None, *, use_gpus: bool = True) -> Iterator[Cluster]:
    """Connect to a cluster, or start Ray on this machine for as long as it takes.

    Nothing is sent to Ray's makers, no dashboard is started, and what is started here listens on this machine alone. A Ray
    that was there before is left running.

    Args:
        address: `HOST:PORT` or "auto"; None is that of the environment's RAY_ADDRESS, or Ray of this process.
        workers: how many; None is one for each GPU, or one for two cores.
        use_gpus: whether a Ray that is started here is to use the GPUs.

    Raises:
        UsageError: Ray is not installed, or the address is none that can be used.
        PixelwiseError: no cluster answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    with ExitStack() as stack:
        stack.enter_context(_environment(_ENVIRONMENT | (_ALONE if address is None else {})))
        with quiet():
            ray, data = (extra(name, "cluster", "--engine ray") for name in ("ray", "ray.data"))
            # Of a worker that died it would tell on the standard output; the outcomes tell what matters of it.
            stack.enter_context(_set("ray._private.worker", "_worker_logs_enabled", False))
            is_ours = not ray.is_initialized()
            if is_ours:
                # A thread of Ray Data that still asks something after the end must not start another Ray; so for good.
                vars(importlib.import_module("ray._private.auto_init_hook"))["enable_auto_connect"] = False
                stack.callback(ray.shutdown)
                with _deaf():
                    if address is None:
                        _start(ray, workers, use_gpus, stack)
                    else:
                        _connect(ray, address)
            stack.enter_context(_settings(data, is_ours))
        yield replace(_measured(ray, workers), is_ours=is_ours)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The environment with these values, where it has none of its own; what Ray adds goes again as well."""
    before = set(os.environ)
    for name, value in values.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in {name for name in os.environ if name.startswith("RAY_")} - before:
            del os.environ[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Ray warns of its own obsolete settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _set(module: str, name: str, value: object) -> Iterator[None]:
    """A variable of Ray that no option sets; where a version of Ray lacks it, nothing happens."""
    variables = vars(importlib.import_module(module))
    if name not in variables:
        yield
        return
    before, variables[name] = variables[name], value
    try:
        yield
    finally:
        variables[name] = before


@contextmanager
def _deaf() -> Iterator[None]:
    """While Ray's core starts, it writes past Python to the terminal which level its log has."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no terminal
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _start(ray: ModuleType, workers: int | None, use_gpus: bool, stack: ExitStack) -> None:
    # What the environment says of the addresses to listen on counts only before Ray is imported.
    stack.enter_context(_set("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", False))
    # Not below TMPDIR: sockets lie there, whose paths must be short.
    place = "/tmp" if Path("/tmp").is_dir() else None
    folder = tempfile.mkdtemp(prefix="pixelwise-ray-", dir=place)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)  # itself for nobody else; Ray opens what is below to all
    stack.callback(ray.shutdown)  # before the folder goes
    try:
        ray.init(
            address="local",  # else it would join whatever Ray of anybody runs on this machine
            num_cpus=max(os.cpu_count() or 1, workers or 1),
            num_gpus=None if use_gpus else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_STORE_BYTES,
            _temp_dir=f"{folder}/r",
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PixelwiseError(f"engine ray: Ray cannot be started on this machine ({_line(error)}).") from error


def _connect(ray: ModuleType, address: str) -> None:
    if "://" in address:
        raise UsageError(
            f"--address {address}: give HOST:PORT of the cluster's head (6379, not Ray's client), or auto on one of its "
            "machines. From elsewhere, submit the command: ray job submit -- pixelwise predict ..."
        )
    try:
        _refuse_silence(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PixelwiseError(
            f"--address {address}: no Ray cluster answers there ({_line(error)}). Start one with `ray start --head`, or "
            "leave --address out to use this machine alone. One that asks for a token wants RAY_AUTH_MODE=token."
        ) from error


def _refuse_silence(address: str) -> None:
    """Raise `OSError` or `ValueError` if no Ray listens at an address; Ray itself would try for a minute, or for ever."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError("it must be HOST:PORT, or auto")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as line:
        if os.environ.get("RAY_USE_TLS", "0") == "1":
            return
        line.sendall(_PREFACE)
        answer = b""
        while len(answer) < 9 and (more := line.recv(9)):
            answer += more
    if len(answer) < 9 or answer[3] != _SETTINGS:
        raise ConnectionError("what listens there is something else")


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
        return Cluster(ray, count, float(max(0, min(MOST_THREADS, math.floor(share)))), gpus)
    cpus = _CORES if sum(each // _CORES for each in cores) >= count else 1
    return Cluster(ray, min(count, max(1, sum(cores))), float(cpus), 0.0)


@contextmanager
def _settings(data: ModuleType, is_ours: bool) -> Iterator[None]:
    """No bars and no log lines of Ray Data; a row that fails does not end the others."""
    context, log = data.DataContext.get_current(), logging.getLogger("ray.data")
    wanted: dict[str, Any] = {
        "enable_progress_bars": False,
        "max_errored_blocks": -1,
        "max_consecutive_actor_init_deaths": _INIT_DEATHS,
    }
    before = {name: getattr(context, name) for name in wanted if hasattr(context, name)}
    handlers, level = log.handlers, log.level
    for name in before:
        setattr(context, name, wanted[name])
    log.handlers = [logging.NullHandler()]
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        if not is_ours:  # else threads that find no Ray any more complain later
            log.handlers = handlers
            log.setLevel(level)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
