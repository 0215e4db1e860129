"""``esper serve`` as a person or a script meets it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.server.listening import is_loopback

GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or "grpcurl"


def grpcurl(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [GRPCURL, "-plaintext", *arguments], input=text, capture_output=True, text=True, check=False, timeout=30
    )


def refused(*flags: str) -> str:
    """What `esper serve` says when it does not start."""
    result = CliRunner().invoke(main, ["serve", "--port", "0", *flags])
    assert result.exit_code == 1, result.output
    return result.output


def test_reflection_lists_every_service(server) -> None:
    listed = grpcurl(server.target, "list").stdout.split()
    assert {"esperml.v1.Oona", "esperml.v1.Tamiyo", "esperml.v1.Runs", "grpc.health.v1.Health"} <= set(listed)


@pytest.mark.parametrize("service", ["", "esperml.v1.Oona", "esperml.v1.Tamiyo", "esperml.v1.Runs"])
def test_every_service_is_healthy(server, service: str) -> None:
    answer = grpcurl("-d", f'{{"service": "{service}"}}', server.target, "grpc.health.v1.Health/Check")
    assert "SERVING" in answer.stdout, answer.stderr


def test_sigterm_stops_it_in_good_order(start_server) -> None:
    server = start_server("--policy", "chance")
    assert server.stop() == 0
    assert "stopping" in server.log.read_text()


def test_an_address_beyond_loopback_is_refused_unless_told_so(tmp_path: Path) -> None:
    message = refused("--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert "--insecure" in message
    assert "0.0.0.0" in message


def test_an_address_beyond_loopback_is_served_when_told_so(start_server) -> None:
    server = start_server("--host", "0.0.0.0", "--insecure", "--policy", "chance")
    assert server.target.startswith("0.0.0.0:")
    assert "esperml.v1.Oona" in grpcurl(f"127.0.0.1:{server.port}", "list").stdout


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("example", False)],
)
def test_loopback_is_told_from_the_rest(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(
            main, ["serve", "--port", str(port), "--data-dir", str(tmp_path), "--policy", "chance"]
        )
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.output


def test_a_damaged_log_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "oona.sqlite").write_bytes(b"this is not a database" * 1000)
    assert "oona.sqlite" in refused("--data-dir", str(tmp_path), "--policy", "chance")


def test_a_second_server_on_one_folder_is_refused(start_server, tmp_path: Path) -> None:
    start_server("--policy", "chance")
    assert "oona.sqlite" in refused("--data-dir", str(tmp_path / "data"), "--policy", "chance")


def test_a_policy_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "no-such-policy" in refused("--data-dir", str(tmp_path), "--policy", "no-such-policy")


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("[tamiyo]\nhealth_threshold = 2\n")
    assert "tamiyo.health_threshold" in refused("--config", str(file))
