"""``esper trainer`` as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from esperml.tamiyo import checkpoint
from esperml.trainer.cli import train, trainer
from esperml.trainer.training import LATEST, TrainingSettings

QUICK = (
    "--steps",
    "4",
    "--evaluate-every",
    "2",
    "--hidden",
    "8",
    "--layers",
    "1",
    "--batch-size",
    "8",
    "--device",
    "cpu",
)


def _esper(*arguments: str | Path) -> Result:
    return CliRunner().invoke(trainer, [str(argument) for argument in arguments])


@pytest.fixture
def recording(small_world: Any, record: Callable[[Any], Path]) -> Path:
    return record(small_world)


@pytest.fixture(scope="module")
def trained(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, folder = synthetic.make_world(4, 3, seed=7), tmp_path_factory.mktemp("trained")
    synthetic.write_recording(folder / "recording.mcap", world.experiences, world.runs)
    result = _esper("train", folder, "--out", folder / "policy", *QUICK)
    assert result.exit_code == 0, result.output
    return folder / "policy"


@pytest.fixture
def policy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "policy")


def test_help_teaches_without_importing_torch() -> None:
    code = (
        "import sys; from esperml.trainer.cli import trainer; from click.testing import CliRunner\n"
        "for name in ([], ['train'], ['inspect'], ['evaluate'], ['collect']):\n"
        "    print(CliRunner().invoke(trainer, [*name, '--help']).output)\n"
        "assert not {'torch', 'numpy', 'mcap'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for example in ("esper trainer train runs/demo", "esper trainer inspect policies/mine", "--resume"):
        assert example in result.stdout


def test_what_the_command_line_offers_is_the_default_of_the_settings() -> None:
    defaults = asdict(TrainingSettings())
    defaults |= defaults.pop("algorithm")
    offered = {parameter.name: parameter.default for parameter in train.params if parameter.name in defaults}
    assert {"learning_rate", "batch_size", "steps", "seed", "capacity", "hidden"} <= set(offered)
    for name, default in offered.items():
        assert (default if name != "patience" else None) == defaults[name], name


def test_training_inspecting_and_evaluating_follow_one_another(recording: Path, policy: Path) -> None:
    inspected = _esper("inspect", policy)
    assert inspected.exit_code == 0
    assert f"policy {checkpoint.load(policy).version}" in inspected.output
    assert "gate, mlp" in inspected.output
    evaluated = _esper("evaluate", policy, recording)
    assert evaluated.exit_code == 0
    assert "adaptation_accuracy" in evaluated.output
    as_json = CliRunner().invoke(trainer, ["evaluate", str(policy), str(recording), "--json"])
    metrics = json.loads(as_json.stdout)
    assert metrics["decisions"] > 0
    assert "policy_gain" in metrics


def test_training_says_what_was_read_how_it_went_and_what_to_do_next(recording: Path, tmp_path: Path) -> None:
    result = _esper("train", recording.parent, "--out", tmp_path / "new", *QUICK)
    assert "36 of 36 experiences from 1 recordings are used" in result.output
    assert "4/4" in result.output
    assert "policy_gain" in result.output
    assert f"esper serve --policy {tmp_path / 'new'}" in result.output


def test_training_on_too_little_is_warned_of(recording: Path, tmp_path: Path) -> None:
    result = _esper("train", recording, "--out", tmp_path / "new", "--validation-fraction", 0, *QUICK)
    assert "Warning: there are only 36 experiences of 4 hosts to learn from" in result.output
    assert "Warning: no host is held out" in result.output
    assert "no host is held out" not in _esper("train", recording, "--out", tmp_path / "other", *QUICK).output


def test_resuming_keeps_what_is_not_given_again(policy: Path) -> None:
    result = _esper("train", "--out", policy, "--resume", "--steps", "6")
    assert result.exit_code == 0, result.output
    notes = checkpoint.load(policy / LATEST).metadata.notes
    assert notes["step"] == "6"
    settings = json.loads(notes["settings"])
    assert (settings["hidden"], settings["algorithm"]["batch_size"], settings["evaluate_every"]) == (8, 8, 2)


def test_epochs_are_passes_over_what_is_not_held_out(recording: Path, tmp_path: Path) -> None:
    result = _esper("train", recording, "--out", tmp_path / "policy", *QUICK, "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert checkpoint.load(tmp_path / "policy" / LATEST).metadata.notes["step"] == "8"  # 2 × 36 × 0.8 / 8


def test_inspecting_a_recording_says_what_it_holds(recording: Path) -> None:
    result = _esper("inspect", recording)
    assert result.exit_code == 0, result.output
    assert "12 events, 36 experience" in result.output
    assert "12: run-7-0-0" in result.output
    assert "and 2 more" in result.output
    assert "UTC to 2" in result.output
    assert "episodes  12 on 4 hosts" in result.output
    assert "reward    mean" in result.output
    assert "36 by chance" in result.output


def test_inspecting_a_truncated_recording_says_so(synthetic: ModuleType, record: Callable[[Any], Path]) -> None:
    path = record(synthetic.make_world(120, 3, seed=5))
    path.write_bytes(path.read_bytes()[:-2000])
    result = _esper("inspect", path)
    assert f"{path} (cut short)" in result.output
    assert "what it held after these events is lost" in result.output
    assert result.exit_code == 0
    path.write_bytes(path.read_bytes()[:2000])
    result = _esper("inspect", path)
    assert result.exit_code == 1
    assert "cut off or damaged before its first whole event" in result.output


def test_a_recording_without_rewards_can_be_inspected_but_not_learnt_from(
    small_world: Any, record: Callable[[Any], Path], policy: Path, tmp_path: Path
) -> None:
    for item in small_world.experiences:
        item.ClearField("reward")
    path = record(small_world)
    assert "36 without a reward left out" in _esper("inspect", path).output
    for arguments in (("train", path, "--out", tmp_path / "other"), ("evaluate", policy, path)):
        result = _esper(*arguments)
        assert result.exit_code == 1
        assert "there is nothing to" in result.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("train", "--out", "policy"), "Name at least one recording"),
        (("train", "missing.mcap", "--out", "policy"), "does not exist"),
        (("train", "--out", "missing", "--resume"), "holds no training to resume"),
        (("train", "RECORDING", "--out", "new", "--learning-rate", "-1"), "learning_rate is -1.0"),
        (("train", "RECORDING", "--out", "new", "--validation-fraction", "2"), "validation_fraction is 2.0"),
        (("train", "RECORDING", "--out", "new", "--capacity", "2"), "more than the capacity of 2"),
        (("train", "RECORDING", "--out", "POLICY"), "holds a training already"),
        (("train", "--out", "POLICY", "--resume", "--epochs", "3"), "--epochs needs recordings"),
        (("train", "FOLDER", "--out", "new"), "holds no recording"),
        (("inspect", "FOLDER"), "holds no recording"),
        (("evaluate", "FOLDER", "RECORDING"), "policy.json"),
        (("evaluate", "POLICY"), "Name at least one recording"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...],
    problem: str,
    recording: Path,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    named = {"RECORDING": recording, "POLICY": policy, "FOLDER": folder}
    result = _esper(*(named.get(argument, argument) for argument in arguments))
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert problem in result.output
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(recording: Path, tmp_path: Path) -> None:
    result = _esper("train", recording, "--out", tmp_path / "policy", "--device", "cuda")
    assert result.exit_code == 1
    assert "torch sees no GPU here" in result.output
