"""A real server in a process of its own, for as long as a measurement takes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from esperml.bench.hosts import BLUEPRINTS
from esperml.tamiyo import checkpoint
from esperml.tamiyo.policy import PolicyConfig, PolicyNetwork
from esperml.tamiyo.store import SHIPPED_PATH


class ServerFailedError(RuntimeError):
    """The server did not come up; the message ends with what it wrote."""


@contextlib.contextmanager
def server_process(policy: Path | None, threads: int) -> Iterator[str]:
    """Run ``esper serve`` on a free port.

    Args:
        policy: checkpoint to serve. None: the shipped one, or random weights of the same size where none is shipped.
        threads: threads that torch may use in the server.

    Yields:
        Its address.

    Raises:
        ServerFailedError: it ended before it listened.
    """
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as scratch:
        folder = Path(scratch)
        served = policy or (SHIPPED_PATH if SHIPPED_PATH.exists() else random_policy(folder / "random"))
        command = [sys.executable, "-m", "esperml.cli", "serve", "--port", "0"]
        command += ["--data-dir", str(folder / "data"), "--policy", str(served)]
        environment = {**os.environ, "ESPER_TAMIYO__THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        with (folder / "log").open("w+b") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)  # noqa: S603
            try:
                assert process.stdout is not None  # noqa: S101 - it is piped
                line = process.stdout.readline()
                if not line:
                    log.seek(0)
                    raise ServerFailedError(f"the server did not start:\n{log.read().decode(errors='replace')}")
                yield json.loads(line)["listening"]
            finally:
                process.terminate()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()


def random_policy(path: Path) -> Path:
    """Write a checkpoint of random weights, of the size that ships, and return ``path``."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        checkpoint.save(path, PolicyNetwork(PolicyConfig(BLUEPRINTS)))
    finally:
        torch.random.set_rng_state(generator)
    return path
