"""Every command and program of docs/oona.md runs as it stands, from top to bottom, against one server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.client.retry import RETRYABLE
from esperml.v1 import oona_pb2

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "oona.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="one of the commands is curl")
def test_every_command_and_program_of_the_page_runs(
    start_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve, *commands = [line for block in blocks("bash") for line in block.splitlines()]
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = str(free.getsockname()[1])
    flags = serve.replace("9464", metrics_port).removeprefix("esper serve --port 50051 --data-dir esper-data ").split()
    server = start_server(*flags, "--policy", "chance")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        """What a command says: ours in this process, where it has not to start first."""
        program, *arguments = line.replace("9464", metrics_port).split()
        if program == "esper":
            result = CliRunner(env={"ESPER_TARGET": server.target}).invoke(main, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            return result.stdout
        return subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=30).stdout

    [program] = blocks("python")
    exec(compile(program.replace("localhost:50051", server.target), "docs/oona.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "0 my-run 1"
    said = {line: run(line) for line in commands}
    assert "1 events (1 events) of 1 run" in said["esper record night.mcap --from earliest --until-idle 1s"]
    assert "1 events of again-my-run" in said["esper replay night.mcap --speed max --run-prefix again-"]
    assert 'oona_events_stored_total{kind="events"} 2.0' in said[commands[-1]]


def test_the_page_names_every_reason_and_every_status_that_is_tried_again() -> None:
    reasons = {name.removeprefix("REJECT_REASON_") for name in oona_pb2.RejectReason.DESCRIPTOR.values_by_name} - {
        "UNSPECIFIED"
    }
    assert set(re.findall(r"^\| ([A-Z_]+) \| .* \| .* \| .* \|$", PAGE, flags=re.MULTILINE)) == reasons
    [retried] = re.findall(r"^\| (.*) \| .* \| opens another \|$", PAGE, flags=re.MULTILINE)
    assert {status.name for status in RETRYABLE} == set(retried.split(", "))
