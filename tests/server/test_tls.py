"""TLS: who is believed, what a wrong certificate is told, and certificates that are renewed."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import re
import shutil
import socket
import time

import pytest
from cryptography import x509

from esperml.client import CallFailedError, Credentials, OonaClient, TamiyoClient, TamiyoError, new_event
from esperml.server.tls import Certificates, TlsError
from esperml.settings import ServerSettings
from esperml.v1 import event_pb2, run_pb2

EVENTS = event_pb2.KIND_EVENTS


@pytest.fixture
def tls(authority):
    certificate, key = authority.issue("server")
    return {"certificate": certificate, "key": key}


async def refusal(target: str, credentials: Credentials) -> str:
    """What a client is told that is not let in."""
    with pytest.raises(CallFailedError) as caught:
        await OonaClient(target, client_id="a", credentials=credentials).topics()
    return caught.value.detail


async def test_a_client_that_trusts_the_authority_publishes_and_asks(serve, tls, authority):
    credentials = Credentials(ca=authority.ca)
    async with serve(tokens=False, server=tls) as guarded:
        async with OonaClient(guarded.target, client_id="a", credentials=credentials) as oona:
            event = new_event("run", run_ended=run_pb2.RunEnded())
            assert (await oona.publish(EVENTS, [event], timeout_s=20)).count == 1
            assert sum(topic.next_offset for topic in await oona.topics()) >= 1
        async with TamiyoClient(guarded.target, credentials=credentials) as tamiyo:
            assert await tamiyo.policies()


async def test_what_is_wrong_between_client_and_server_is_said_in_words(serve, tls, authority, make_authority):
    stranger = make_authority("stranger")
    elsewhere = (x509.IPAddress(ipaddress.ip_address("127.0.0.2")), x509.DNSName("oona.example"))
    async with serve(tokens=False, server=tls) as guarded:
        said = await refusal(guarded.target, Credentials())
        assert "if it uses TLS, name its authority with --ca" in said
        said = await refusal(guarded.target, Credentials(ca=stranger.ca))
        assert f"does not come from {stranger.ca}" in said
        assert "does not come from the authorities of this system" in await refusal(
            guarded.target, Credentials(tls=True)
        )
        with pytest.raises(TamiyoError, match="if it uses TLS"):
            async with TamiyoClient(guarded.target) as tamiyo:
                await tamiyo.policies()
    expired, key = authority.issue("expired", ends=-datetime.timedelta(days=1))
    async with serve(tokens=False, server={"certificate": expired, "key": key}) as guarded:
        assert "has expired" in await refusal(guarded.target, Credentials(ca=authority.ca))
    other, key = authority.issue("other", names=elsewhere)
    async with serve(tokens=False, server={"certificate": other, "key": key}) as guarded:
        assert "is for another name" in await refusal(guarded.target, Credentials(ca=authority.ca))
    async with serve(tokens=False) as guarded:
        assert "does not speak TLS" in await refusal(guarded.target, Credentials(ca=authority.ca))


async def test_with_an_authority_of_clients_only_their_certificates_open(serve, tls, authority, make_authority):
    certificate, key = authority.issue("client")
    stranger, strange_key = make_authority("stranger").issue("stranger-client")
    async with serve(tokens=False, server=tls | {"client_ca": authority.ca}) as guarded:
        said = await refusal(guarded.target, Credentials(ca=authority.ca))
        assert "give --cert and --key" in said
        wrong = Credentials(ca=authority.ca, certificate=stranger, key=strange_key)
        assert "may not trust the authority of the client's certificate" in await refusal(guarded.target, wrong)
        right = Credentials(ca=authority.ca, certificate=certificate, key=key)
        assert await OonaClient(guarded.target, client_id="a", credentials=right).topics()


async def test_a_renewed_certificate_serves_the_next_connection_and_a_bad_one_does_not(
    serve, tls, authority, make_authority, capfd
):
    successor = make_authority("successor")
    async with serve(tokens=False, server=tls) as guarded:
        tls["certificate"].write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
        oona = OonaClient(guarded.target, client_id="a", credentials=Credentials(ca=authority.ca))
        assert await oona.topics()
        assert "certificate_not_renewed" in "".join(capfd.readouterr())
        fresh, key = successor.issue("fresh")
        shutil.copy(key, tls["key"])
        shutil.copy(fresh, tls["certificate"])
        renewed = OonaClient(guarded.target, client_id="a", credentials=Credentials(ca=successor.ca))
        assert await renewed.topics()
        assert "does not come from" in await refusal(guarded.target, Credentials(ca=authority.ca))


@pytest.mark.parametrize("encrypted", [True, False])
async def test_a_connection_that_says_nothing_is_closed(serve, tls, encrypted):
    server = {"handshake_timeout_s": 0.3} | (tls if encrypted else {})
    async with serve(tokens=False, server=server) as guarded:
        host, _, port = guarded.target.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        started = time.monotonic()
        async with asyncio.timeout(20):
            while await reader.read(1024):
                pass
        assert time.monotonic() - started < 10
        writer.close()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"client_ca": "ca"}, "server.client_ca: needs server.certificate"),
        ({"certificate": "good"}, "server.key: is not set"),
        ({"key": "good"}, "server.certificate: is not set"),
        ({"certificate": "missing", "key": "good"}, "server.certificate: .*No such file"),
        ({"certificate": "good", "key": "text"}, "server.key: .* holds no PEM"),
        ({"certificate": "good", "key": "another"}, "does not go with server.key"),
        ({"certificate": "good", "key": "good", "client_ca": "text"}, "server.client_ca: .* holds no PEM"),
    ],
)
def test_settings_that_make_no_tls_are_refused_by_name(authority, tmp_path, fields, problem):
    certificate, key = authority.issue("good")
    files = {
        ("certificate", "good"): certificate,
        ("key", "good"): key,
        ("key", "another"): authority.issue("another")[1],
    }
    text = tmp_path / "text"
    text.write_text("no certificate")
    given = {
        name: text if which == "text" else files.get((name, which), tmp_path / which) for name, which in fields.items()
    }
    with pytest.raises(TlsError, match=problem):
        Certificates.from_settings(ServerSettings(**given))


def test_no_settings_are_no_tls():
    assert Certificates.from_settings(ServerSettings()) is None


def test_the_port_that_is_taken_is_named_without_other_noise(tmp_path, capfd):
    from click.testing import CliRunner

    from esperml.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--port", port, "--data-dir", str(tmp_path), "--policy", "chance"]
        result = CliRunner().invoke(main, arguments)
    assert result.output.strip().splitlines()[-1] == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use"
    # What gRPC itself logs begins with a letter and the date.
    assert not re.search(r"^[A-Z]\d{4} ", capfd.readouterr().err, re.MULTILINE)
