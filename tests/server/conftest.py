"""Certificates made for a test, and a whole server in this process that asks for them and for tokens."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from esperml.client import Credentials
from esperml.oona.access import Role
from esperml.server import app
from esperml.server.tokens import create
from esperml.settings import Settings

LOCAL: tuple[x509.GeneralName, ...] = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
)


class Authority:
    """Makes certificates, into files of ``folder``; ``ca`` is the file of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(self._sign(self._subject, self._key, ca=True).public_bytes(serialization.Encoding.PEM))

    def issue(
        self, name: str, *, names: Sequence[x509.GeneralName] = LOCAL, ends: datetime.timedelta | None = None
    ) -> tuple[Path, Path]:
        """A certificate and its key; ``ends`` from now, which may be in the past."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, private = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        signed = self._sign(subject, key, names=names, ends=ends)
        certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, private

    def _sign(self, subject, key, *, ca=False, names=(), ends=None) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + (datetime.timedelta(days=1) if ends is None else ends))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@dataclass
class Guarded:
    """A server that runs in this process.

    Attributes:
        target: its address.
        tokens: its file of tokens.
    """

    target: str
    tokens: Path

    def token(self, role: str, *runs: str, name: str = "", expires_at: datetime.datetime | None = None) -> Credentials:
        """Credentials with a new token, which the server knows after its next look."""
        made, _ = create(self.tokens, role=Role(role), runs=runs or ("*",), expires_at=expires_at, name=name)
        return Credentials(token=made)


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Guarded]]


@pytest.fixture
def make_authority(tmp_path: Path) -> Callable[[str], Authority]:
    return lambda name: Authority(tmp_path, name)


@pytest.fixture
def authority(make_authority: Callable[[str], Authority]) -> Authority:
    return make_authority("authority")


@pytest.fixture
def make_token(tmp_path: Path) -> Callable[..., Credentials]:
    """Credentials with a token in ``tokens.json``, made before the server starts."""
    return Guarded("", tmp_path / "tokens.json").token


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Serves in this process: ``async with serve(tokens=True, server={…}, oona={…}) as guarded``."""

    @contextlib.asynccontextmanager
    async def serving(*, tokens: bool = True, **sections: dict[str, object]) -> AsyncIterator[Guarded]:
        path = tmp_path / "tokens.json"
        server = {"port": 0, "data_dir": tmp_path / "data", "shutdown_grace_s": 0.5} | sections.pop("server", {})
        if tokens:
            server["tokens"] = path
            if not path.exists():
                create(path, role=Role.ADMIN, runs=["*"], expires_at=None, name="first")
        settings = Settings.model_validate({"server": server, "tamiyo": {"policy": "chance"}} | sections)
        stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(app.serve(settings, stop=stop, ready=listening.set_result))
        await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        try:
            yield Guarded(listening.result(), path)
        finally:
            stop.set()
            await task

    return serving
