"""The examples run, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_classifier_grows_and_its_decisions_can_be_watched(server) -> None:
    # Chance adapts often, so that there is something to watch whatever the shipped policy thinks of this host.
    said = run("grow_a_classifier.py", "--target", server.target, "--policy", "chance", "--epochs", "25")
    assert "grow-a-classifier" in said
    assert "held-out loss at the end" in said
    watched = run("watch_decisions.py", "--target", server.target, "--earliest", "--count", "3")
    assert "grow-a-classifier step" in watched


def test_every_example_is_run_by_a_test() -> None:
    tested = {"decide.json", "grow_a_classifier.py", "watch_decisions.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested
