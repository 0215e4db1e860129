"""How a client proves who it is, and how it knows the server: tokens and TLS, in one typed place."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from esperml.client.errors import CredentialsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import grpc

VARIABLES: Final[Mapping[str, str]] = {
    "token": "ESPER_TOKEN",
    "token_file": "ESPER_TOKEN_FILE",
    "tls": "ESPER_TLS",
    "ca": "ESPER_CA",
    "certificate": "ESPER_CERT",
    "key": "ESPER_KEY",
}
"""Variable of the environment that each field of :class:`Credentials` is read from."""

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client needs to be let in. Without any of it, it connects in the clear and without a token.

    Files are read whenever a connection is made, so that a renewed certificate or token serves the next one.

    Attributes:
        token: bearer token.
        token_file: file that holds it, in place of ``token``.
        tls: connect with TLS and trust the certificate authorities of the system. Implied by the three that follow.
        ca: certificates of the authorities that the server's certificate may come from (PEM), in place of the system's.
        certificate: the client's own certificate chain (PEM), where the server asks for one.
        key: its private key (PEM).

    Raises:
        CredentialsError: a token and a token's file are given, or of a certificate and its key only one.
    """

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if self.token is not None and self.token_file is not None:
            raise CredentialsError("token_file", "a token is given as well; give one of them")
        if (self.certificate is None) != (self.key is None):
            missing = "key" if self.key is None else "certificate"
            raise CredentialsError(missing, "is missing: a certificate and its key go together")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """The credentials that ``ESPER_TOKEN``, ``ESPER_TOKEN_FILE``, ``ESPER_TLS``, ``ESPER_CA``, ``ESPER_CERT`` and
        ``ESPER_KEY`` describe.

        Args:
            environment: variables. Default: those of the process. An empty one counts as not set.

        Raises:
            CredentialsError: they do not go together, or ``ESPER_TLS`` is neither true nor false.
        """
        environment = os.environ if environment is None else environment
        given = {name: environment.get(variable) or None for name, variable in VARIABLES.items()}
        tls = (given["tls"] or "").strip().lower()
        if tls not in _TRUE | _FALSE:
            raise CredentialsError("tls", f"{VARIABLES['tls']} is {tls!r}, which is neither true nor false")
        paths = {
            name: None if (path := given[name]) is None else Path(path)
            for name in ("token_file", "ca", "certificate", "key")
        }
        return cls(token=given["token"], tls=tls in _TRUE, **paths)

    @property
    def has_token(self) -> bool:
        """Whether a token goes along."""
        return self.token is not None or self.token_file is not None

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or self.ca is not None or self.certificate is not None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that carries the token, if there is one. Raises :class:`CredentialsError` where it is none."""
        token = self.token
        if self.token_file is not None:
            try:
                token = self.token_file.read_text(encoding="ascii")
            except UnicodeDecodeError:
                raise CredentialsError("token_file", f"{self.token_file} holds no token") from None
            except OSError as error:
                raise CredentialsError("token_file", f"{self.token_file}: {error.strerror}") from error
        if token is None:
            return ()
        token = token.strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise CredentialsError(
                "token" if self.token_file is None else "token_file", "holds no token: it is one word of ASCII"
            )
        return (("authorization", f"Bearer {token}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """What gRPC needs for TLS; None for a plain connection. Raises :class:`CredentialsError` for a bad file."""
        if not self.uses_tls:
            return None
        import grpc

        return grpc.ssl_channel_credentials(_pem("ca", self.ca), _pem("key", self.key), _pem("cert", self.certificate))


NO_CREDENTIALS: Final = Credentials()
"""A plain connection without a token."""


def _pem(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CredentialsError(name, f"{path}: {error.strerror}") from error
    if b"-----BEGIN" not in data:
        raise CredentialsError(name, f"{path} holds no PEM")
    return data


def is_local(target: str) -> bool:
    """Whether what goes to ``target`` stays on this machine, as far as its name tells."""
    # The colon belongs to it: "unix.example.org:50051" is a host's name.
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = target.removeprefix("dns:///")
    host = address.rpartition(":")[0] if address.count(":") == 1 or address.startswith("[") else address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def explain(detail: str, credentials: Credentials) -> str:
    """What gRPC said of a connection that did not come about, led by what to do where that tells the cause.

    Args:
        detail: what gRPC said.
        credentials: those of the connection.
    """
    hint = _hint(detail, credentials)
    return detail if hint is None else f"{hint} (gRPC says: {detail})"


def _hint(detail: str, credentials: Credentials) -> str | None:
    if "WRONG_VERSION_NUMBER" in detail:
        return "the server does not speak TLS: connect without --tls, --ca and --cert, or give it a certificate"
    if "certificate has expired" in detail:
        return "the server's certificate has expired: it must be renewed (or this machine's clock is wrong)"
    if "certificate is not yet valid" in detail:
        return "the server's certificate is not valid yet: is this machine's clock right?"
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        trusted = "the authorities of this system" if credentials.ca is None else str(credentials.ca)
        return f"the server's certificate does not come from {trusted}: name its authority with --ca or ESPER_CA"
    if "Hostname Verification" in detail:
        return "the server's certificate is for another name: connect by a name that stands in it"
    if not ("failed to connect" in detail and ("Socket closed" in detail or "Connection reset" in detail)):
        return None
    if not credentials.uses_tls:
        return "the server closed the connection at once: if it uses TLS, name its authority with --ca or ESPER_CA"
    if credentials.certificate is None:
        return "the server closed the connection at once: if it asks for a client's certificate, give --cert and --key"
    return "the server closed the connection at once: it may not trust the authority of the client's certificate"
