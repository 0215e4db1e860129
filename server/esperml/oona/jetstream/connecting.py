"""Connects to the servers of a NATS cluster, and says which setting is wrong where they do not let us in."""

from __future__ import annotations

import asyncio
import importlib.util
import ssl
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import nats.errors
import structlog
from nats.aio.client import Client

from esperml.oona.log import LogUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.settings import JetStreamSettings

_log = structlog.get_logger(__name__)

# Bytes that may wait for the socket: a batch, and what goes on beside it.
_PENDING_BYTES: Final = 128 * 2**20


class _TlsClient(Client):
    """A client that speaks TLS or not at all.

    The library's own leaves that to the server: of one that asks for no TLS, or of whoever stands before it, it would
    be led to send the password in the clear.
    """

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


async def connect(settings: JetStreamSettings) -> Client:
    """Connect to the first of the servers that lets us in.

    Raises:
        LogUnavailableError: none of them does in time, or a setting cannot be used.
    """
    servers = split_addresses(settings.servers)
    _check_addresses(servers)
    options: dict[str, Any] = {}
    if settings.credentials_file is not None:
        _check_credentials(settings.credentials_file)
        options["user_credentials"] = str(settings.credentials_file)
    if settings.tls_ca_file is not None:
        options["tls"] = _tls(settings.tls_ca_file)
    encrypted = settings.tls_ca_file is not None or any(server.startswith("tls://") for server in servers)
    client = _TlsClient() if encrypted else Client()
    causes: deque[str] = deque(maxlen=1)

    async def on_error(error: Exception) -> None:
        # A server that refuses us may break the connection the next time before it says why.
        if not client.is_connected and (cause := _cause(error, settings)) is not None:
            causes.append(cause)
        await _on_error(error)

    try:
        async with asyncio.timeout(settings.timeout_s):
            await client.connect(
                servers=servers,
                name="esper oona",
                error_cb=on_error,
                reconnected_cb=_on_reconnected,
                connect_timeout=2,
                reconnect_time_wait=0.2,  # type: ignore[arg-type]
                max_reconnect_attempts=-1,
                # A server that stands still is left after three seconds, not four minutes.
                ping_interval=1,
                max_outstanding_pings=3,
                pending_size=_PENDING_BYTES,
                **options,
            )
    except (OSError, nats.errors.Error, TimeoutError) as error:
        with suppress(OSError, nats.errors.Error):
            await client.close()
        why = causes[0] if causes else f"no NATS server answers: {client.last_error or error!r}"
        raise LogUnavailableError(f"oona.jetstream.servers: {without_passwords(servers)}: {why}") from error
    return client


def split_addresses(text: str) -> list[str]:
    """The addresses of a list that is separated by commas."""
    return [address for part in text.split(",") if (address := part.strip())]


def without_passwords(servers: Sequence[str]) -> str:
    """The addresses as errors may show them, which clients see: without the user and the password before an @."""
    shown = (server.rpartition("://") for server in servers)
    return ", ".join(f"{scheme}{mark}{rest.rpartition('@')[2]}" for scheme, mark, rest in shown)


def _check_addresses(servers: Sequence[str]) -> None:
    if not servers:
        raise LogUnavailableError("oona.jetstream.servers: must name a server, for example nats://127.0.0.1:4222")
    for number, server in enumerate(servers, 1):
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        try:
            readable = bool(parts.hostname) and parts.port != 0 and "@" not in parts.path + parts.query + parts.fragment
        except ValueError:
            readable = False
        if not readable:
            # Not shown: what cannot be read may be a piece of the password.
            raise LogUnavailableError(
                f"oona.jetstream.servers: address {number} must be like nats://host:4222, or nats://user:password"
                "@host:4222 with a password that has none of , / ? # in it"
            )


def _check_credentials(path: Path) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LogUnavailableError(f"oona.jetstream.credentials_file: {path}: {error.strerror}") from error
    if b"BEGIN NATS USER JWT" not in data or b"BEGIN USER NKEY SEED" not in data:
        raise LogUnavailableError(
            f"oona.jetstream.credentials_file: {path} holds no credentials, as nsc writes them: a JWT and a seed"
        )
    if importlib.util.find_spec("nkeys") is None:
        raise LogUnavailableError(
            "oona.jetstream.credentials_file: needs nkeys, which is not installed: pip install 'nats-py[nkeys]'"
        )


def _tls(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise LogUnavailableError(f"oona.jetstream.tls_ca_file: {ca_file} holds no certificates in PEM") from error
    except OSError as error:
        raise LogUnavailableError(f"oona.jetstream.tls_ca_file: {ca_file}: {error.strerror}") from error


def _cause(error: Exception, settings: JetStreamSettings) -> str | None:
    """Which setting keeps us out, where an error tells that."""
    if isinstance(error, nats.errors.AuthorizationError) or "authorization" in str(error).lower():
        given = "oona.jetstream.credentials_file" if settings.credentials_file else "the user and password before the @"
        return f"the servers refuse {given} ({error})"
    if isinstance(error, ssl.SSLCertVerificationError):
        trusted = "the authorities of this system" if settings.tls_ca_file is None else str(settings.tls_ca_file)
        return f"their certificate is not trusted by oona.jetstream.tls_ca_file ({trusted}): {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection comes about: {error.reason or error}"
    if isinstance(error, nats.errors.SecureConnWantedError):
        return "the servers speak no TLS, which oona.jetstream.tls_ca_file or tls:// asks for"
    return None


async def _on_error(error: Exception) -> None:
    if isinstance(error, nats.errors.Error | OSError | TimeoutError):
        _log.debug("nats_error", error=repr(error))
    else:
        _log.error("message_not_taken", exc_info=error)  # Of what we do with messages that come.


async def _on_reconnected() -> None:
    _log.info("nats_reconnected")
