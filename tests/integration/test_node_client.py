"""A client in another language, made from the protos alone, against a real server."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What npm says where the lock file is at fault, and not the network.
FAULTS_OF_THE_LOCK = ("EUSAGE", "EINTEGRITY", "EJSONPARSE", "ETARGET")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its packages, in a folder of its own: nothing is installed into the repository."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no node, or no npm")
    root = tmp_path_factory.mktemp("node")
    (root / "examples").mkdir()
    (root / "proto").symlink_to(ROOT / "proto")
    shutil.copy(ROOT / "examples" / "decide.json", root / "examples")
    folder = root / "examples" / "node"
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        [npm, "ci", "--prefer-offline", "--no-audit", "--no-fund", "--fetch-retries=1"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if installed.returncode:
        assert not any(fault in installed.stderr for fault in FAULTS_OF_THE_LOCK), installed.stderr
        pytest.skip(f"its packages cannot be had: {installed.stderr.strip()}")
    return folder


def test_a_client_in_node_publishes_subscribes_grants_acknowledges_and_asks_for_a_decision(server, example) -> None:
    result = subprocess.run(
        ["node", "main.js", server.target], cwd=example, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout.splitlines()
    first = int(re.fullmatch(r"published: 3 events from offset (\d+)", said[1])[1])
    assert said == [
        "open: confirmed means fsync",
        f"published: 3 events from offset {first}",
        *(f"delivered: epoch {epoch}" for epoch in range(3)),
        f"acknowledged: the group is done below offset {first + 3}",
        "refused: REJECT_REASON_WRONG_PAYLOAD: "
        "publish.events[0].payload: is run_ended, but kind telemetry carries health_report",
        said[7],
    ]
    assert re.fullmatch(r"decided by chance: (none|germinate)", said[7])


def test_without_a_server_it_says_so_and_ends(example) -> None:
    result = subprocess.run(
        ["node", "main.js", "127.0.0.1:1"], cwd=example, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode != 0
    assert "UNAVAILABLE" in result.stderr


def test_the_lock_file_names_no_registry_but_the_public_one() -> None:
    lock = (ROOT / "examples" / "node" / "package-lock.json").read_text(encoding="utf-8")
    hosts = set(re.findall(r'"resolved": "https?://([^/"]+)', lock))
    assert hosts <= {"registry.npmjs.org"}
