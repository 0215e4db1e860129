"""Every program and command of docs/offline.md runs as it stands, from top to bottom."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from esperml import kasmina
from esperml.cli import main
from esperml.client import describe
from esperml.kasmina import outbox, spool

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "offline.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_program_and_command_of_the_page_runs(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(32, 10), torch.randint(0, 3, (32,))
    kasmina.wrap(model, x)
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"kasmina": kasmina, "model": model, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss()}
    names |= {"x": x, "y": y}
    spooled, recorded = blocks("python")
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = str(free.getsockname()[1])
    exec(compile(spooled.replace("50051", nobody), "docs/offline.md", "exec"), names)
    names["session"].close()
    [left] = Path("unsent").iterdir()
    assert describe(left).counts.total() == 2
    exec(compile(recorded, "docs/offline.md", "exec"), names)
    inspect, replay = [line.split()[1:] for block in blocks("bash") for line in block.splitlines()]
    invoke = CliRunner(env={"ESPER_TARGET": server.target}).invoke
    said = invoke(main, inspect)
    assert said.exit_code == 0, said.output
    assert "telemetry, 2 events" in said.output
    said = invoke(main, replay)
    assert said.exit_code == 0, said.output
    assert f"{describe('offline.mcap').counts.total()} events" in said.output


def test_the_figures_of_the_page_are_those_of_the_code() -> None:
    assert f"the latest {outbox.MAX_REPORTS} of them" in PAGE
    assert f"up to {outbox.MAX_OTHERS:,} events" in PAGE
    assert f"({spool.SpoolOptions().max_bytes // 2**20} MiB unless" in PAGE
