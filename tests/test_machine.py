"""What a process may use is what its container, job or shell allows, not what the machine has."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixelwise import machine
from pixelwise.infer import devices, estimates
from pixelwise.train import plan

GIB = 1 << 30


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 32 of them free; its cgroups lie in the folder that is given."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tx\nVmSize:\t 1048576 kB\nVmData:\t 524288 kB\n")
    (tmp_path / "self" / "cgroup").write_text("0::/jobs/a\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable: {32 << 20} kB\n")
    for name, path in (("_CGROUPS", "cg"), ("_SELF", "self"), ("_MEMORY", "meminfo")):
        monkeypatch.setattr(machine, name, tmp_path / path)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (-1, -1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    return tmp_path / "cg"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_without_limits_it_is_what_the_machine_has_free(fake: Path) -> None:
    assert machine.memory_room() == machine.Room(32 * GIB, "the 64.0 GiB of this machine")
    assert machine.processors() == 16


def test_the_narrowest_cgroup_above_a_process_counts(fake: Path) -> None:
    write(fake / "jobs" / "a", memory__max="max\n", memory__current="7\n", memory__stat="inactive_file 0\n")
    write(fake / "jobs", memory__max=f"{4 * GIB}\n", memory__current=f"{3 * GIB}\n", cpu__max="250000 100000\n")
    write(fake / "jobs", memory__stat=f"anon 5\ninactive_file {GIB}\n")
    room = machine.memory_room()
    assert room is not None and room.bytes == 2 * GIB and "4.0 GiB of this container or job" in str(room)
    read_twice = (
        f"inactive_file {GIB}\nactive_file {GIB}\nfile_mapped {GIB // 2}\n"  # the kernel drops all but libraries
    )
    write(fake / "jobs", memory__stat=read_twice)
    room = machine.memory_room()
    assert room is not None and room.bytes == 2 * GIB + GIB // 2
    assert machine.processors() == 2


def test_cgroups_of_version_1_and_those_of_a_container_that_sees_only_its_own(fake: Path) -> None:
    (fake.parent / "self" / "cgroup").write_text("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/\n")
    write(fake / "memory", memory__limit_in_bytes=f"{2 * GIB}", memory__usage_in_bytes=f"{GIB}", memory__stat="x 1")
    write(fake / "cpu,cpuacct", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert machine.memory_room() == machine.Room(GIB, "the 2.0 GiB of this container or job (cgroup)")
    assert machine.processors() == 1


def test_ulimit_counts_what_is_taken_already(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 5 * GIB, resource.RLIMIT_DATA: -1}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], -1))
    assert machine.memory_room() == machine.Room(4 * GIB, "the 5.0 GiB that `ulimit -v` allows")


def test_a_real_limit_is_seen() -> None:
    code = "from pixelwise.machine import memory_room; print(memory_room())"
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v 900000; exec "{sys.executable}" -c "{code}"'], capture_output=True, text=True
    )
    assert "GiB are free of the 879 MiB that `ulimit -v` allows" in done.stdout, done.stderr


def test_small_shared_memory_is_told(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SHARED", tmp_path / "nowhere")
    assert machine.shared_memory_room() is None
    monkeypatch.setattr(machine, "_SHARED", tmp_path)
    room = machine.shared_memory_room()
    assert room is not None and room.bytes > 0 and "--shm-size" in str(room)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENFILE, "Too many open files in system", "a.png"),
            "a.png: too many files are open at once (ulimit -n)",
        ),
        (RuntimeError("unable to open file </torch_1>: Too many open files (24)"), "too many files are open at once"),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "no further process or thread may be started",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "run"), "run: the disk is full (Disk quota exceeded). Free some"),
        (MemoryError(), "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("could not create a primitive"), "memory ran out"),
        (RuntimeError("can't start new thread"), "no further process or thread may be started (ulimit -u"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied."),
        (OSError("odd"), "odd."),
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_what_the_machine_refuses_is_told_in_words(error: Exception, told: str | None) -> None:
    found = machine.refused(error)
    assert found is None if told is None else found is not None and found.startswith(told)


def test_within_what_is_free_too_much_is_an_error_and_not_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    def container(free: int):
        monkeypatch.setattr(machine, "_free_of_cgroups", lambda: iter([machine.Room(free, "this container")]))

    before = resource.getrlimit(resource.RLIMIT_DATA)
    container(256 << 20)
    with machine.within_room():
        with pytest.raises(MemoryError):
            bytearray(300 << 20)
        with machine.within_room():  # inside each other they share one limit
            assert len(bytearray(20 << 20)) == 20 << 20
        room = machine.memory_room()
        assert room is not None and "this container" in room.limit  # not our own limit as if it were `ulimit -d`
        with pytest.raises(MemoryError):
            bytearray(300 << 20)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    container(600 << 20)
    with machine.within_room(0.5, beside=100 << 20), pytest.raises(MemoryError):
        bytearray(300 << 20)
    with machine.within_room():
        assert len(bytearray(300 << 20)) == 300 << 20


def test_torch_takes_no_more_threads_than_a_quota_allows_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(estimates, "allowed_cores", lambda: 16)
    monkeypatch.setattr(estimates, "processors", lambda: 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for threads in (16, 8, 5, 1):  # those of the machine, of its cores, and what only a user chooses
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        devices.resolve_device("auto" if not torch.cuda.is_available() else "cpu")
    assert chosen == [2, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    devices.resolve_device("cpu")
    assert chosen == [2, 2]


def test_worker_processes_take_at_most_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "worker_count", lambda: 16)
    for free, wanted in ((32 * GIB, 8), (4 * GIB, 4), (GIB // 2, 0)):
        monkeypatch.setattr(plan, "memory_room", lambda free=free: machine.Room(free, "this container"))
        assert plan.default_workers("cuda") == wanted and plan.default_workers("cpu") == min(1, wanted)


KEEPING = """
import torch
from pixelwise import machine

def held_after_freeing(mib=64):
    big = torch.ones(mib << 18)  # which glibc would give back at once
    del big
    return machine._sizes_of_process()["VmRSS"] >> 20

machine.keep_freed_memory(False)
before = held_after_freeing()
machine.keep_freed_memory(True)
kept, again = held_after_freeing(), held_after_freeing(48)
machine.keep_freed_memory(False)
print(before, kept, again, machine._sizes_of_process()["VmRSS"] >> 20)
"""


def test_freed_memory_is_kept_and_given_back() -> None:
    if machine._glibc() is None:
        pytest.skip("the C library is not glibc")
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True, timeout=120)
    before, kept, again, after = map(int, done.stdout.split())
    assert kept >= before + 60
    assert again <= kept + 8  # the second array lies where the first one was
    assert after <= before + 8
