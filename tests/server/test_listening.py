"""Where the server may listen, and what it says where it may not."""

from __future__ import annotations

import tempfile

import pytest

from esperml.server.listening import ExposedAddressError, check_exposure
from esperml.settings import ServerSettings

TLS = {"certificate": "server.pem", "key": "server.key"}
TOKENS = {"tokens": "tokens.json"}


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({}, r"needs TLS \(--certificate and --key\) and tokens \(--tokens\); pass --insecure"),
        (TLS, r"needs tokens \(--tokens\); pass"),
        (TOKENS, r"needs TLS \(--certificate and --key\); pass"),
    ],
)
def test_beyond_loopback_it_names_what_it_lacks(fields, missing):
    for host in ("0.0.0.0", "::", "192.0.2.1", "oona.example"):
        with pytest.raises(ExposedAddressError, match=missing) as caught:
            check_exposure(ServerSettings(host=host, **fields))
        assert caught.value.host == host


@pytest.mark.parametrize(
    "settings",
    [
        ServerSettings(),
        ServerSettings(host="::1"),
        ServerSettings(tokens="tokens.json"),
        ServerSettings(host="0.0.0.0", insecure=True),
        ServerSettings(host="0.0.0.0", **TLS, **TOKENS),
    ],
)
def test_loopback_and_what_is_guarded_may_be_listened_on(settings):
    check_exposure(settings)


async def test_an_address_of_another_machine_is_named(serve):
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:1"):
        async with serve(tokens=False, server={"host": "192.0.2.1", "port": 1, "insecure": True}):
            pass


@pytest.mark.parametrize("host", ["localhost", "::1", "0.0.0.0"])
async def test_it_reaches_itself_by_whatever_name_it_listens_on(serve, host):
    async with serve(tokens=False, server={"host": host, "insecure": True}) as guarded:
        assert guarded.target.rpartition(":")[0].strip("[]") == host


async def test_a_temporary_folder_with_too_long_a_path_for_a_socket_is_named(serve, authority, tmp_path, monkeypatch):
    certificate, key = authority.issue("server")
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(OSError, match=r"cannot listen on .*oona\.sock.*too long; set TMPDIR to a folder"):
        async with serve(server={"certificate": certificate, "key": key}):
            pass
    assert list(folder.iterdir()) == []
