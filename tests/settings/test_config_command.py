"""``esper config show`` and the root command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.cli.root import COMMANDS, Mount


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_config_show_says_where_a_value_came_from() -> None:
    result = CliRunner(env={"ESPER_SERVER__PORT": "1234"}).invoke(main, ["config", "show", "--json"])
    assert result.exit_code == 0
    port = json.loads(result.stdout)["server.port"]
    assert (port["value"], port["origin"]) == (1234, "environment ESPER_SERVER__PORT")


def test_config_show_prints_a_table_for_people() -> None:
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == 0
    assert "tamiyo.policy" in result.stdout


def test_config_show_refuses_an_unknown_key_by_name() -> None:
    Path("esper.toml").write_text("[tamiyo]\npolcy = 'x'\n")
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == 1
    assert "tamiyo.polcy (from file esper.toml): is unknown; did you mean tamiyo.policy?" in result.output


def test_help_lists_every_command_without_importing_torch_and_answers_fast() -> None:
    code = (
        "import sys\nfrom esperml.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'grpc', 'rich', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        durations.append(time.perf_counter() - started)
        assert result.returncode == 0, result.stderr
        assert all(name in result.stdout for name in COMMANDS)
    assert min(durations) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_says_more_than_its_name(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert len(result.stdout) > 200


def test_what_is_missing_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "serve", Mount("package_that_is_not_there.cli:serve", "server", "Run."))
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 1
    assert "pip install 'esperml[server]'" in result.output


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(main, ["sreve"])
    assert result.exit_code == 2
    assert "No such command 'sreve'" in result.output
