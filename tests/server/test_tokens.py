"""Tokens: what is kept of them, how they are known again, and the command that makes them."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from esperml.cli import main
from esperml.oona.access import Caller, Role
from esperml.server.tokens import Tokens, TokensError, create, load, revoke
from esperml.server.watch import TokensFile

LATER = timedelta(days=365)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "tokens.json"


@pytest.fixture
def esper_token(path):
    def run(*arguments: str):
        result = CliRunner().invoke(main, ["token", "--file", str(path), *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def make(path, role=Role.HOST, *runs, **fields) -> str:
    return create(path, role=role, runs=runs or ("*",), **{"expires_at": None, **fields})[0]


def test_the_file_has_nothing_from_which_a_token_could_be_made(path):
    token = make(path)
    assert re.fullmatch(r"esper_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", token)
    assert token.split("_", 2)[2] not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_a_token_is_known_again_and_tokens_like_it_are_not(path):
    token = make(path, Role.VIEWER, "a", name="ann")
    tokens = Tokens(load(path))
    known = tokens.identify(token)
    assert isinstance(known, Caller)
    assert (known.name, known.role, known.runs.patterns) == ("ann", Role.VIEWER, ("a",))
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    assert "unknown here, or was revoked" in str(tokens.identify(changed))
    assert "unknown" in str(tokens.identify("esper_00000000" + token[14:]))


@given(st.text(max_size=80))
def test_no_text_at_all_is_taken_for_a_token(text):
    assert "the token is none" in str(Tokens().identify(text))


def test_an_expired_token_is_told_so_and_one_that_is_not_yet_passes(path):
    now = datetime.now(UTC)
    token = make(path, expires_at=now + timedelta(hours=1), name="ann")
    tokens = Tokens(load(path))
    assert isinstance(tokens.identify(token, now), Caller)
    after = now + timedelta(hours=1)
    assert tokens.identify(token, after) == "token 'ann' has expired; `esper token new` makes another"


def test_of_two_tokens_of_one_name_one_can_be_revoked(path):
    old, new = make(path, name="ann"), make(path, name="ann")
    tokens = Tokens(load(path))
    caller = tokens.identify(old)
    revoke(path, caller.token_id)
    tokens.replace(load(path))
    assert "was revoked" in str(tokens.standing(caller))
    assert isinstance(tokens.identify(new), Caller)
    make(path, name="ann")
    assert len(revoke(path, "ann")) == 2


def test_the_servers_own_token_is_in_no_file_and_outlives_its_changes(path):
    tokens = Tokens()
    token = tokens.add_internal("tamiyo@server", Role.CONTROLLER)
    tokens.replace([])
    caller = tokens.identify(token)
    assert isinstance(caller, Caller)
    assert caller.runs.every
    assert not caller.limited
    assert tokens.standing(caller) == caller
    with pytest.raises(TokensError, match="must have 1 to 64 letters"):
        make(path, name="tamiyo@server")


def test_tokens_made_at_the_same_time_are_all_kept(path):
    threads = [threading.Thread(target=make, args=(path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load(path)) == 8
    assert {item.name for item in path.parent.iterdir()} == {"tokens.json", "tokens.json.lock"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file: Invalid JSON"),
        ('{"tokens": {}}', "tokens: Input should be a valid"),
        ('{"version": 2}', "version: Input should be 1"),
        ('{"tokens": [{"id": "xyz"}]}', r"tokens\.0\.id"),
        ("\xff", "the file"),
    ],
)
def test_a_file_that_is_not_as_it_must_be_is_refused_with_the_place(path, text, problem):
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(TokensError, match=problem) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_with_one_id_twice_is_refused(path):
    make(path)
    document = json.loads(path.read_text())
    document["tokens"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(TokensError, match="two tokens have one id"):
        load(path)


def test_the_command_prints_the_token_once_and_alone(esper_token, path):
    result = esper_token("new", "--role", "host", "--run", "my-run*", "--expires", "30d")
    assert result.exit_code == 0
    token = result.stdout.strip()
    assert isinstance(Tokens(load(path)).identify(token), Caller)
    assert "role host, runs my-run*, ends" in result.stderr
    (entry,) = load(path)
    assert timedelta(days=29) < entry.expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert token not in esper_token("list").output


def test_the_command_lists_and_revokes(esper_token):
    esper_token("new", "--role", "viewer", "--name", "ann", "--expires", "never")
    esper_token("new", "--role", "controller", "--run", "a", "--run", "b*", "--name", "bob")
    lines = esper_token("list").output.splitlines()
    assert lines[0].split() == ["id", "name", "role", "ends", "runs"]
    assert lines[1].split()[1:] == ["ann", "viewer", "never", "ends", "*"]
    assert lines[2].endswith("a, b*")
    listed = [json.loads(line) for line in esper_token("list", "--json").output.splitlines()]
    assert [(item["name"], item["role"], item["runs"]) for item in listed] == [
        ("ann", "viewer", ["*"]),
        ("bob", "controller", ["a", "b*"]),
    ]
    assert "sha256" not in listed[0]
    assert esper_token("revoke", "ann").output == f"revoked {listed[0]['id']} (ann, role viewer)\n"
    assert len(esper_token("list").output.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "--role", "host"], "a host needs --run"),
        (["new", "--role", "host", "--run", "a*b"], "may have * only as its last character"),
        (["new", "--role", "viewer", "--name", "a b"], "must have 1 to 64 letters"),
        (["new", "--role", "viewer", "--expires", "soon"], "'soon' is no time"),
        (["new", "--role", "viewer", "--expires", "0d"], "'0d' is no time"),
        (["revoke", "nobody"], "there is no token with the id or the name 'nobody'"),
        (["list"], "No such file"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_a_line(esper_token, arguments, message):
    result = esper_token(*arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_the_file_of_the_settings_is_the_default(path, monkeypatch):
    new = ["token", "new", "--role", "viewer"]
    assert "which file?" in CliRunner().invoke(main, new).output
    monkeypatch.setenv("ESPER_SERVER__TOKENS", str(path))
    assert CliRunner().invoke(main, new).exit_code == 0
    assert len(load(path)) == 1
    monkeypatch.setenv("ESPER_SERVER__PORT", "many")
    assert "server.port" in CliRunner().invoke(main, new).output


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokensError, match=r"Not a directory|File exists"):
        make(tmp_path / "file" / "tokens.json")


def test_a_token_that_was_made_just_now_is_known_at_once(path):
    make(path, Role.VIEWER)
    file = TokensFile(path)
    fresh = make(path, Role.HOST, name="fresh")
    assert isinstance(file.tokens.identify(fresh), Caller)
