"""Where the server listens: which addresses it may, by what it is asked there, and how it reaches itself."""

from __future__ import annotations

import ipaddress
import socket
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from esperml.server.tls import Certificates

if TYPE_CHECKING:
    import grpc

    from esperml.settings import ServerSettings


class ExposedAddressError(ValueError):
    """The server was told to listen beyond loopback without TLS and tokens, and not that it may.

    Attributes:
        host: the address.
    """

    def __init__(self, host: str, missing: str) -> None:
        super().__init__(
            f"server.host: {host} can be reached from other machines, so the server needs {missing}; pass --insecure "
            "to listen there all the same"
        )
        self.host = host


class ExposedMetricsError(ExposedAddressError):
    """The server was told to serve metrics beyond loopback, where anybody could read them, and not that it may."""

    def __init__(self, host: str) -> None:
        ValueError.__init__(
            self,
            f"server.metrics_host: {host} can be reached from other machines, and metrics are served in the clear and "
            "to everybody; let Prometheus come over loopback, or pass --insecure",
        )
        self.host = host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Of names, only ``localhost`` counts as that."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: ServerSettings) -> None:
    """Raise :class:`ExposedAddressError` for an address beyond loopback that has not both TLS and tokens."""
    if settings.insecure or is_loopback(settings.host):
        return
    missing = [
        what
        for what, given in (
            ("TLS (--certificate and --key)", settings.certificate is not None),
            ("tokens (--tokens)", settings.tokens is not None),
        )
        if not given
    ]
    if missing:
        raise ExposedAddressError(settings.host, " and ".join(missing))


def listen(
    server: grpc.aio.Server, settings: ServerSettings, certificates: Certificates | None, stack: AsyncExitStack
) -> tuple[str, str]:
    """Have a server listen as the settings say.

    With TLS it listens on a Unix socket of its own as well, in a folder that only its user can enter: so the process
    reaches itself whatever name its certificate is for, and without a client's certificate.

    Args:
        server: the server, which has not started.
        settings: where to listen.
        certificates: for TLS. None: in the clear.
        stack: gives the folder back when it is closed.

    Returns:
        The address, ``host:port``, and the one by which this process reaches it.

    Raises:
        OSError: the address is taken, or none of this machine; the folder for temporary files cannot hold the socket.
    """
    address = _address(settings.host, settings.port)
    _check_free(settings.host, settings.port)
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.server_credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    address = _address(settings.host, port)
    if certificates is None:
        # Nothing connects to "any address".
        own = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(settings.host, settings.host)  # noqa: S104
        return address, _address(own, port)
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-"))) / "oona.sock"
    _check_socket(path)
    inside = f"unix:{path}"
    server.add_insecure_port(inside)
    return address, inside


def _check_socket(path: Path) -> None:
    """Try a socket's path first, for the same reason: systems allow about 100 bytes."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    except OSError as error:
        problem = error.strerror or str(error)  # Python's own complaint of a path's length has no number.
        raise OSError(
            f"cannot listen on {path}, by which the server reaches itself: {problem}; set TMPDIR to a folder that can "
            "be written and has a short path"
        ) from error
    path.unlink()


def _check_free(host: str, port: int) -> None:
    """Try the address first: gRPC would write lines of its own to standard error before it says that it is taken."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                # One that others listen on can be bound, but not listened on.
                probe.listen()
    except OSError as error:
        raise OSError(f"cannot listen on {_address(host, port)}: {error.strerror}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
