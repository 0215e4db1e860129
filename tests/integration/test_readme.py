"""Every command in the README runs, and its code does what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]
# Where what belongs together begins.
GRPCURL, TOPICS, RECORD, REPLAY, INSPECT, TRAIN, CONFIG, BENCH = 3, 4, 6, 7, 8, 9, 11, 12


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the shortest demo was run."""
    folder = tmp_path_factory.mktemp("readme")
    run(["esper", "demo", "--quick", "--no-live"], folder)
    return folder


def run(command: list[str], folder: Path, text: str | None = None) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd=folder, env=environment, input=text, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_readme_has_the_commands_that_are_tested_here() -> None:
    assert COMMANDS == [
        "make demo",
        "make test",
        "esper serve --port 50051 --data-dir esper-data",
        "grpcurl -plaintext -d @ localhost:50051 esperml.v1.Tamiyo/Decide < examples/decide.json",
        "esper topics list",
        "esper topics tail decisions --from earliest --no-follow",
        "esper record run.mcap --run my-run --from earliest --until-idle 1s",
        "esper replay run.mcap --speed max --as-run my-run-again",
        "esper trainer inspect runs/demo",
        "esper trainer train runs/demo --out policies/mine --learning-rate 0.001 --batch-size 64 --device auto",
        "esper serve --policy policies/mine",
        "esper config show",
        "esper bench decide --json",
        "esper bench oona --quick",
    ]


@pytest.mark.parametrize(
    ("target", "last"), [("demo", "esper demo"), ("test", "-m pytest"), ("cluster", "esper cluster")]
)
def test_make_does_the_set_up_and_then_the_work(target: str, last: str) -> None:
    lines = run(["make", "--dry-run", "--always-make", target], ROOT).splitlines()
    assert any("pip install" in line for line in lines)
    assert last in lines[-1]


def test_a_decision_comes_for_the_example(server) -> None:
    *command, _, example = COMMANDS[GRPCURL].split()
    command[command.index("localhost:50051")] = server.target
    assert '"decision"' in run(command, ROOT, (ROOT / example).read_text())


@pytest.mark.slow
def test_the_demo_leaves_what_the_readme_names(demo: Path) -> None:
    assert (demo / "runs/demo/summary.json").is_file()
    assert (demo / "runs/demo/report.html").is_file()
    assert list((demo / "runs/demo").glob("*.mcap"))


@pytest.mark.slow
def test_recordings_of_the_demo_are_inspected_trained_on_and_the_result_is_served(demo: Path, start_server) -> None:
    assert "experience" in run(COMMANDS[INSPECT].split(), demo)
    # A few steps show that it works; how well is a question for more than a demo's recordings.
    run([*COMMANDS[TRAIN].split(), "--steps", "20"], demo)
    server = start_server("--policy", str(demo / "policies/mine"))
    assert "mine" in run(["grpcurl", "-plaintext", server.target, "esperml.v1.Tamiyo/ListPolicies"], demo)


def test_config_show_runs(tmp_path: Path) -> None:
    assert "tamiyo.policy" in run(COMMANDS[CONFIG].split(), tmp_path)


@pytest.mark.slow
def test_the_benchmark_prints_json(tmp_path: Path) -> None:
    import json

    assert json.loads(run(COMMANDS[BENCH].split(), tmp_path))


@pytest.mark.slow
def test_the_bench_of_the_bus_runs(tmp_path: Path) -> None:
    # One short block of each shows that it runs; what it says of this machine now is nobody's figure.
    assert "oona-sqlite" in run([*COMMANDS[BENCH + 1].split(), "--rounds", "1", "--block", "0.05"], tmp_path)


def test_the_training_loop_of_the_readme_runs_as_it_stands_and_the_bus_shows_it(
    server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("python")
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = (inputs.sum(dim=1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 2))
    loss_function = nn.CrossEntropyLoss()
    names = {
        "model": model,
        "example_input": inputs[:2],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loader": [(inputs, targets)] * 100,
        "loss_function": loss_function,
        "val_loss": lambda module: float(loss_function(module(inputs), targets)),
    }
    exec(compile(code.replace("localhost:50051", server.target), "README.md", "exec"), names)
    assert "my-run" in capsys.readouterr().out
    answer = run(
        ["grpcurl", "-plaintext", "-d", '{"run_id": "my-run"}', server.target, "esperml.v1.Runs/DescribeRun"], ROOT
    )
    assert "RUN_STATUS_COMPLETED" in answer
    at_server = ["--server", server.target]
    assert "telemetry" in run([*COMMANDS[TOPICS].split(), *at_server], tmp_path)
    run([*COMMANDS[TOPICS + 1].split(), *at_server], tmp_path)
    assert "telemetry" in run([*COMMANDS[RECORD].split(), *at_server], tmp_path)
    run([*COMMANDS[REPLAY].split(), *at_server], tmp_path)
    tail = "esper topics tail telemetry --from earliest --no-follow --run my-run-again"
    assert "my-run-again" in run([*tail.split(), *at_server], tmp_path)
