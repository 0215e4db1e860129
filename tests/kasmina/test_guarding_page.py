"""Every program of docs/guarding.md runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from esperml.kasmina import loss_watch
from esperml.kasmina.governor import GovernorOptions
from esperml.v1 import graph_pb2

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guarding.md").read_text(encoding="utf-8")


def test_every_program_of_the_page_runs(unused_port, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    """No server is there: that does not matter to it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block.replace("localhost:50051", f"127.0.0.1:{unused_port}"), "docs/guarding.md", "exec"), names)
    names["session"].close()
    assert names["session"].failure == ""
    assert "3" in capsys.readouterr().out.splitlines()
    assert isinstance(names["limits"], graph_pb2.RunLimits)


def test_the_figures_of_the_page_are_those_in_force():
    options = GovernorOptions()
    assert (
        f"every {options.snapshot_every} steps while a seed lives or a change is young ({options.probation_steps}"
        in PAGE
    )
    assert f"stalled: {loss_watch.STALL} steps" in PAGE
    assert (loss_watch.NOT_FINITE, options.snapshots) == (2, 2)
