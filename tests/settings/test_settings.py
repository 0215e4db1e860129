"""Where settings come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from esperml.settings import SettingsError, load, sources


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("[server]\nport = 1\nhost = '::1'\ninsecure = true\n")
    environment = {"ESPER_SERVER__PORT": "2", "ESPER_SERVER__HOST": "127.0.0.2"}
    settings, listed = sources(file=file, environment=environment, flags={"server.port": 3})
    assert settings.server.port == 3
    assert settings.server.host == "127.0.0.2"
    assert settings.server.insecure is True
    origins = {source.key: source.origin for source in listed}
    assert origins["server.port"] == "flag --port"
    assert origins["server.host"] == "environment ESPER_SERVER__HOST"
    assert origins["server.insecure"] == f"file {file}"
    assert origins["server.data_dir"] == "default"


def test_every_setting_says_what_it_is_for() -> None:
    _, listed = sources(environment={})
    assert [source.key for source in listed if not source.description] == []


def test_an_unknown_key_is_refused_by_name_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("[server]\nprot = 1\n")
    with pytest.raises(SettingsError, match=r"server\.prot .*did you mean server\.port"):
        load(file=file, environment={})


def test_an_unknown_environment_variable_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="ESPER_NOTHING__LIKE_THIS"):
        load(environment={"ESPER_NOTHING__LIKE_THIS": "1"})


def test_a_bad_value_is_refused_by_name_and_source() -> None:
    with pytest.raises(SettingsError, match=r"server\.port \(from environment ESPER_SERVER__PORT\)") as caught:
        load(environment={"ESPER_SERVER__PORT": "many"})
    assert caught.value.key == "server.port"


def test_sections_may_lie_in_sections(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("[oona.retention.telemetry]\nage_s = 60\n[oona.retention]\nevents = { records = 5 }\n")
    environment = {"ESPER_OONA__RETENTION__TELEMETRY__BYTES": "7"}
    settings, listed = sources(file=file, environment=environment)
    telemetry = settings.oona.retention.telemetry
    assert (telemetry.age_s, telemetry.bytes, telemetry.records) == (60, 7, 0)
    assert settings.oona.retention.events.records == 5
    origins = {source.key: source.origin for source in listed}
    assert origins["oona.retention.telemetry.age_s"] == f"file {file}"
    assert origins["oona.retention.telemetry.bytes"] == "environment ESPER_OONA__RETENTION__TELEMETRY__BYTES"


def test_a_value_in_the_place_of_a_section_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("[oona]\nretention = 5\n")
    with pytest.raises(SettingsError, match=r"oona\.retention "):
        load(file=file, environment={})


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("[server\n")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load(file=file, environment={})


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        load(environment={"ESPER_CONFIG": str(tmp_path / "none.toml")})


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load(file=tmp_path, environment={})


def test_a_value_outside_a_section_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "esper.toml"
    file.write_text("port = 1\n")
    with pytest.raises(SettingsError, match=r"port .*is not a section"):
        load(file=file, environment={})


def test_a_file_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "esper.toml").write_text("[log]\nformat = 'json'\n")
    monkeypatch.chdir(tmp_path)
    assert load(environment={}).log.format == "json"


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    assert load(environment={}, flags={"server.port": None}) == load(environment={})


def test_variables_that_say_where_to_connect_are_no_settings() -> None:
    assert load(environment={"ESPER_TARGET": "example:1", "ESPER_TOKEN": "secret", "ESPER_SPOOL": "unsent"}) == load(
        environment={}
    )
