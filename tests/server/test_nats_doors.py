"""How a gateway is let in by its NATS cluster, and what it says where it is not: the setting, never the password."""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from pathlib import Path

import pytest

from esperml.oona.engines import open_broker
from esperml.oona.jetstream.nats_server import NatsServer, NatsServerError, find_nats_server, free_ports
from esperml.oona.log import LogUnavailableError
from esperml.settings import JetStreamSettings, OonaSettings

pytest.importorskip("nats")

PASSWORD = "s3cret"


@pytest.fixture
async def start_nats(tmp_path):
    """Starts a nats-server with these further lines of configuration; gives host and port."""
    try:
        find_nats_server()
    except NatsServerError as error:
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:

        async def start(*configuration: str) -> str:
            client, monitor, route = free_ports(3)
            server = NatsServer(tmp_path, f"nats-{client}", (client, monitor, route), configuration=configuration)
            server.start()
            stack.callback(server.kill)
            await server.ready()
            return f"127.0.0.1:{client}"

        yield start


def tls_lines(authority, name: str = "nats") -> str:
    certificate, key = authority.issue(name)
    return f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}'


USERS = f"authorization {{ users: [ {{ user: ann, password: {PASSWORD} }} ] }}"


async def check_stores(tmp_path: Path, **cluster: object) -> None:
    settings = OonaSettings(engine="jetstream", jetstream=JetStreamSettings(timeout_s=20, **cluster))
    async with open_broker(settings, tmp_path) as broker:
        assert await broker.next_sequence("p") == 1


async def refusal(tmp_path: Path, **cluster: object) -> str:
    """What is said where it does not open; nothing of it shows the password, not even where it came from."""
    settings = OonaSettings(engine="jetstream", jetstream=JetStreamSettings(timeout_s=1, **cluster))
    with pytest.raises(LogUnavailableError) as caught:
        async with open_broker(settings, tmp_path):
            pass
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


async def test_a_user_with_a_password_is_let_in_and_another_is_told_what_is_refused(start_nats, tmp_path):
    host = await start_nats(USERS)
    await check_stores(tmp_path, servers=f"nats://ann:{PASSWORD}@{host}")
    for user in ("", "bob:s3cret@", "ann:wrong@"):
        said = await refusal(tmp_path, servers=f"nats://{user}{host}")
        assert said.startswith(f"oona.jetstream.servers: nats://{host}: the servers refuse the user and password")


async def test_a_cluster_with_tls_is_used_where_its_authority_is_named(start_nats, tmp_path, authority, make_authority):
    host = await start_nats(tls_lines(authority), USERS)
    await check_stores(tmp_path, servers=f"nats://ann:{PASSWORD}@{host}", tls_ca_file=authority.ca)
    await check_stores(tmp_path, servers=f"tls://ann:{PASSWORD}@{host}", tls_ca_file=authority.ca)
    other = make_authority("other")
    for fields in ({}, {"tls_ca_file": other.ca}):
        said = await refusal(tmp_path, servers=f"nats://ann:{PASSWORD}@{host}", **fields)
        assert "their certificate is not trusted by oona.jetstream.tls_ca_file" in said
    said = await refusal(tmp_path, servers=f"nats://ann:wrong@{host}", tls_ca_file=authority.ca)
    assert "the servers refuse the user and password before the @" in said


async def test_a_cluster_where_tls_is_a_choice_is_used_with_it(start_nats, tmp_path, authority, make_authority):
    host = await start_nats(tls_lines(authority), "allow_non_tls: true")
    await check_stores(tmp_path, servers=f"nats://{host}", tls_ca_file=authority.ca)
    said = await refusal(tmp_path, servers=f"nats://{host}", tls_ca_file=make_authority("other").ca)
    assert "not trusted" in said


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_whoever_asks_for_tls_never_sends_the_password_in_the_clear(tmp_path, authority, scheme):
    """As one who stands between, and takes the word TLS from what the server says."""
    heard = bytearray()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        facts = {"server_id": "x", "version": "2.15.0", "max_payload": 2**20, "headers": True, "auth_required": True}
        writer.write(b"INFO " + json.dumps(facts).encode() + b"\r\n")
        while data := await reader.read(4096):
            heard.extend(data)
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as between:
        port = between.sockets[0].getsockname()[1]
        fields = {"tls_ca_file": authority.ca} if scheme == "nats" else {}
        said = await refusal(tmp_path, servers=f"{scheme}://ann:{PASSWORD}@127.0.0.1:{port}", **fields)
    assert "the servers speak no TLS, which oona.jetstream.tls_ca_file or tls:// asks for" in said
    assert PASSWORD.encode() not in heard


async def test_files_and_addresses_that_cannot_be_used_are_named(tmp_path):
    absent, empty = tmp_path / "absent", tmp_path / "empty"
    empty.write_text("nothing\n")
    for setting, problem in (("tls_ca_file", "no certificates in PEM"), ("credentials_file", "no credentials")):
        assert (
            await refusal(tmp_path, **{setting: absent})
            == f"oona.jetstream.{setting}: {absent}: No such file or directory"
        )
        said = await refusal(tmp_path, **{setting: empty})
        assert said.startswith(f"oona.jetstream.{setting}: {empty} holds {problem}")
    for servers in (",", f"nats://ann:{PASSWORD},4@one:4222", f"nats://ann:{PASSWORD}/4@one:4222", "nats://"):
        assert (await refusal(tmp_path, servers=servers)).startswith("oona.jetstream.servers: ")


async def test_a_monitoring_address_that_does_not_answer_is_named_without_its_password(start_nats, tmp_path):
    host = await start_nats()
    [port] = free_ports(1)
    for address in (f"http://127.0.0.1:{port}", f"http://ann:{PASSWORD}@127.0.0.1:{port}", f"ann:{PASSWORD}@one"):
        said = await refusal(tmp_path, servers=f"nats://{host}", monitoring=address)
        assert said.startswith("oona.jetstream.monitoring: ")
        assert "does not answer" in said
