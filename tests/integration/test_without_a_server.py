"""Servers come, go and hang beside a run that they may not change; a recorded run is read and replayed by commands."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from esperml import kasmina
from esperml.client import describe
from esperml.kasmina.link import Link

STEPS = 120


class Run:
    """What came of a run: losses, weights, and the time that each step took in all, in s."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.session: kasmina.Session | None = None


def train(target: str | Link | None, *, at: dict[int, Callable[[], object]] | None = None) -> Run:
    """Train a small host; ``None`` for no session at all. ``at``: what to do before a step, out of its time."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    run = Run()
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x, y = torch.randn(64, 32), torch.randint(0, 4, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if target is not None:
        kasmina.wrap(model, x)
        run.session = kasmina.connect(target, model, optimizer, run="r", mode="observe", report_every=5)
    for step in range(STEPS):
        if at is not None and step in at:
            at[step]()
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.session is not None:
            run.session.step(loss=loss)
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
    if run.session is not None:
        run.session.close()
        assert run.session.failure == ""
    run.weights = [parameter.detach().clone() for parameter in model.parameters()]
    return run


def command(*words: str) -> str:
    """What a command of ours says; it must end well."""
    ended = subprocess.run([sys.executable, "-m", "esperml.cli", *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_run_without_decisions_is_the_same_to_the_bit_whatever_the_server_does(start_server, tmp_path):
    server = start_server("--policy", "chance")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        never = f"127.0.0.1:{free.getsockname()[1]}"
    plain = train(None)
    runs = {
        "up": train(server.target),
        "frozen half way": train(server.target, at={STEPS // 2: lambda: server.process.send_signal(signal.SIGSTOP)}),
    }
    server.process.send_signal(signal.SIGCONT)
    runs["killed half way"] = train(server.target, at={STEPS // 2: server.kill})
    runs["never there"] = train(never)
    runs["a file"] = train(kasmina.FileLink(tmp_path / "run.mcap"))
    for name, run in runs.items():
        assert run.losses == plain.losses, name
        for mine, its in zip(run.weights, plain.weights, strict=True):
            assert torch.equal(mine, its), name
        # A step that waits for a server that hangs waits for a second at least, if it ever ends. A machine that is busy
        # otherwise may hold up a step or two of any run.
        third_slowest = sorted(run.seconds)[-3]
        assert third_slowest < max(20 * max(plain.seconds), 0.25), (name, third_slowest, max(plain.seconds))


def test_a_recorded_run_is_inspected_and_sent_to_a_server_later(start_server, tmp_path):
    path = tmp_path / "run.mcap"
    train(kasmina.FileLink(path))
    events = describe(path).counts.total()
    assert f"{events - 2} telemetry, 2 events" in command("trainer", "inspect", str(path))
    server = start_server("--policy", "chance")
    replayed = json.loads(command("replay", str(path), "--server", server.target, "--speed", "max", "--json"))
    assert replayed["events"] == events
