"""``esper config show`` and the root command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.cli.root import COMMANDS, Mount
from esperml.settings.load import known_keys


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


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_config_show_leaves_names_and_values_whole_however_narrow_the_terminal(columns: str) -> None:
    folder = "/var/lib/" + "long/" * 30
    env = {"COLUMNS": columns, "ESPER_SERVER__DATA_DIR": folder}
    lines = CliRunner(env=env).invoke(main, ["config", "show"]).stdout.splitlines()
    for key in known_keys():
        assert sum(line.startswith(f"{key} = ") for line in lines) == 1
    assert f"server.data_dir = {Path(folder)} (environment ESPER_SERVER__DATA_DIR)" in lines


def test_config_show_refuses_an_unknown_key_by_name() -> None:
    Path("esper.toml").write_text("[tamiyo]\npolcy = 'x'\n")
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == 1
    assert "tamiyo.polcy (from file esper.toml): is unknown; did you mean tamiyo.policy?" in result.output


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=["esper", *COMMANDS])
def test_help_answers_fast_because_it_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom esperml.cli import main\n"
        f"try:\n    main({[*arguments, '--help']!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'grpc', 'google.protobuf', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    durations = []
    for _ in range(3):
        before = os.times()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        ended = os.times()
        # Processor time of the child: other work on the machine must not fail the test.
        durations.append(ended.children_user - before.children_user + ended.children_system - before.children_system)
        assert result.returncode == 0, result.stderr
        assert "Usage:" in result.stdout
    assert min(durations) < 0.3


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_addresses_are_shown_without_passwords(form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Also where a password makes the address one that nothing can use.
    addresses = "nats://ann:s3cret@one:4222, bob:s3cret@two,tls://three:4222,nats://cy:s3cret/x@four"
    monkeypatch.setenv("ESPER_OONA__JETSTREAM__SERVERS", addresses)
    said = CliRunner().invoke(main, ["config", "show", *form]).stdout
    assert "s3cret" not in said
    assert "@one:4222" in said
    assert "@two,tls://three:4222" in said


def test_help_lists_every_command() -> None:
    said = CliRunner().invoke(main, ["--help"]).stdout
    assert [name for name in COMMANDS if name not in said] == []


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
