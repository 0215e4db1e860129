"""Every program of docs/frameworks.md runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^```python ?(\w*)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("program", "needs"), [("", "torch"), ("lightning", "lightning"), ("transformers", "accelerate")]
)
def test_a_program_of_the_page_runs(program, needs, unused_port, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """No server is there: that does not matter to it."""
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    source = PROGRAMS[program].replace("localhost:50051", f"127.0.0.1:{unused_port}")
    exec(compile(source, "docs/frameworks.md", "exec"), names)
    session = names["callback"].session if "callback" in names else names["session"]
    assert session.failure == ""
    assert session.steps >= 20


def test_the_program_for_several_processes_runs_in_two(unused_port, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAMS["torchrun"].replace("localhost:50051", f"127.0.0.1:{unused_port}"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert "run together (act): 100 steps" in done.stdout


def test_no_program_of_the_page_is_left_out():
    assert set(PROGRAMS) == {"", "torchrun", "lightning", "transformers"}
