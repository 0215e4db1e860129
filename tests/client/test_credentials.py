"""What a client needs to be let in: where it is read from, and what is said of what cannot be used."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from esperml.cli.connecting import Server, server_options
from esperml.client import CallFailedError, Credentials, CredentialsError, OonaClient, TamiyoClient
from esperml.client.connection import open_channel
from esperml.client.credentials import VARIABLES, explain, is_local
from esperml.settings.load import NOT_SETTINGS


@click.command()
@server_options
def ask(server: Server) -> None:
    credentials = server.credentials
    click.echo(f"{server.target} {credentials.token} {credentials.ca} {credentials.key} {credentials.uses_tls}")


def test_the_environment_says_it_all(tmp_path):
    environment = {
        "ESPER_TOKEN_FILE": str(tmp_path / "token"),
        "ESPER_CA": "ca.pem",
        "ESPER_CERT": "own.pem",
        "ESPER_KEY": "own.key",
        "ESPER_TLS": "yes",
        "ESPER_TOKEN": "",
    }
    credentials = Credentials.from_environment(environment)
    assert credentials.token is None
    assert str(credentials.ca) == "ca.pem"
    assert str(credentials.certificate) == "own.pem"
    assert credentials.tls
    assert Credentials.from_environment({}) == Credentials()
    assert Credentials.from_environment({"ESPER_TOKEN": "t"}).metadata() == (("authorization", "Bearer t"),)


def test_the_variables_are_no_settings():
    assert set(VARIABLES.values()) <= NOT_SETTINGS


@pytest.mark.parametrize(
    ("environment", "field"),
    [
        ({"ESPER_TOKEN": "t", "ESPER_TOKEN_FILE": "f"}, "token_file"),
        ({"ESPER_CERT": "c"}, "key"),
        ({"ESPER_KEY": "c"}, "certificate"),
        ({"ESPER_TLS": "perhaps"}, "tls"),
    ],
)
def test_what_does_not_go_together_is_named(environment, field):
    with pytest.raises(CredentialsError) as caught:
        Credentials.from_environment(environment)
    assert caught.value.field == field


def test_a_token_is_read_from_its_file_whenever_it_is_needed(tmp_path):
    file = tmp_path / "token"
    credentials = Credentials(token_file=file)
    with pytest.raises(CredentialsError, match="No such file"):
        credentials.metadata()
    for token in ("first", "second"):
        file.write_text(token + "\n")
        assert credentials.metadata() == (("authorization", f"Bearer {token}"),)
    for text, problem in (("", "holds no token"), ("two words", "holds no token"), ("schlüssel", "holds no token")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(CredentialsError, match=problem):
            credentials.metadata()


@pytest.mark.parametrize("token", ["", " ", "a b", "a\nb", "ü"])
def test_what_no_header_can_carry_is_no_token(token):
    with pytest.raises(CredentialsError):
        Credentials(token=token).metadata()


async def test_files_that_cannot_be_used_end_a_client_with_the_reason(tmp_path):
    text = tmp_path / "text"
    text.write_text("no certificate")
    for credentials, problem in (
        (Credentials(ca=tmp_path / "none.pem"), "ca: .*No such file"),
        (Credentials(ca=text), "ca: .*holds no PEM"),
        (Credentials(ca=None, certificate=text, key=text), "key: .*holds no PEM"),
    ):
        with pytest.raises(CredentialsError, match=problem):
            TamiyoClient("localhost:1", credentials=credentials)
        async with OonaClient("localhost:1", client_id="a", credentials=credentials) as oona:
            with pytest.raises(CredentialsError, match=problem):
                await oona.connected()


def test_options_of_commands_beat_the_environment(monkeypatch):
    run = CliRunner().invoke
    assert run(ask, []).output == "localhost:50051 None None None False\n"
    for name, value in (("TARGET", "there:1"), ("TOKEN", "t"), ("CA", "ca.pem"), ("CERT", "c"), ("KEY", "k")):
        monkeypatch.setenv(f"ESPER_{name}", value)
    assert run(ask, []).output == "there:1 t ca.pem k True\n"
    assert run(ask, ["--server", "here:1", "--token", "u", "--ca", "b.pem"]).output == "here:1 u b.pem k True\n"
    result = run(ask, ["--token-file", "f"])
    assert result.exit_code == 2
    assert "a token is given as well" in result.output


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:1", True),
        ("::1", True),
        ("dns:///localhost:1", True),
        ("unix:/run/oona.sock", True),
        ("unix:///run/oona.sock", True),
        ("unix-abstract:oona", True),
        ("unix.example.org:50051", False),
        ("unix-host:50051", False),
        ("unix", False),
        ("dns:///unix.example.org:50051", False),
        ("dns://192.0.2.1/localhost:1", False),
        ("xds:///localhost:1", False),
        ("localhost.example.org:1", False),
        ("oona.example:1", False),
        ("192.0.2.1:1", False),
        ("[2001:db8::1]:1", False),
        ("", False),
    ],
)
def test_what_stays_on_this_machine_is_told_from_the_rest(target, local):
    assert is_local(target) is local


async def test_a_token_that_leaves_the_machine_in_the_clear_is_warned_of_once(capsys):
    for target in ("oona.example:1", "oona.example:1", "localhost:1"):
        await open_channel(target, Credentials(token="t")).close()
    assert capsys.readouterr().out.count("token_sent_in_clear") == 1


def test_what_grpc_says_of_other_things_is_left_as_it_is():
    assert explain("the disk is full", Credentials()) == "the disk is full"


async def test_a_server_that_is_not_there_is_not_taken_for_one_with_tls(unused_tcp_port):
    with pytest.raises(CallFailedError) as caught:
        await OonaClient(f"127.0.0.1:{unused_tcp_port}", client_id="a").topics()
    assert "TLS" not in caught.value.detail
    assert "Connection refused" in caught.value.detail
