"""TLS for the server: certificates from files, read anew when they change."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import structlog

if TYPE_CHECKING:
    from esperml.settings import ServerSettings

_log = structlog.get_logger(__name__)

_Mark = tuple[int, int, int]


class TlsError(ValueError):
    """The server's certificate, its key or the authorities of clients cannot be used.

    Attributes:
        setting: name of the setting, for example ``server.certificate``.
    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting = setting


class Certificates:
    """What the server proves itself with, and what it asks of clients.

    Args:
        certificate: file of its certificate chain (PEM).
        key: file of its private key (PEM).
        client_ca: file of the authorities of clients' certificates (PEM). None: clients need none.

    Raises:
        TlsError: a file cannot be read, holds no PEM, or certificate and key do not go together.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._files: Final = {"certificate": certificate, "key": key}
        if client_ca is not None:
            self._files["client_ca"] = client_ca
        self._seen = self._marks()
        self._lock = threading.Lock()  # Handshakes of several connections ask at once, from threads of gRPC.
        self._first = self._read()
        self._problem = ""

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Certificates | None:
        """What the settings ask for; None where that is no TLS. Raises :class:`TlsError` as the constructor does."""
        if settings.certificate is None and settings.key is None:
            if settings.client_ca is not None:
                raise TlsError("server.client_ca", "needs server.certificate and server.key, which are not set")
            return None
        if settings.certificate is None or settings.key is None:
            missing = "key" if settings.key is None else "certificate"
            raise TlsError(f"server.{missing}", "is not set: a certificate and its key go together")
        return cls(settings.certificate, settings.key, settings.client_ca)

    def server_credentials(self) -> grpc.ServerCredentials:
        """What gRPC needs. A file that changes is read before the next connection; where it is bad, the last stays."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._changed,  # type: ignore[arg-type] # Its stub does not know that None stands for "as it is".
            require_client_authentication="client_ca" in self._files,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            try:
                marks = self._marks()
                if marks == self._seen:
                    return None
                self._seen = marks
                configuration = self._read()
            except TlsError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    _log.error("certificate_not_renewed", detail=self._problem)
                return None
            self._problem = ""
        _log.info("certificate_renewed", certificate=str(self._files["certificate"]))
        return configuration

    def _marks(self) -> dict[str, _Mark]:
        marks = {}
        for name, path in self._files.items():
            try:
                status = path.stat()
            except OSError as error:
                raise TlsError(f"server.{name}", f"{path}: {error.strerror}") from error
            marks[name] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return marks

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self._check_pair()
        return grpc.ssl_server_certificate_configuration(
            [(self._pem("key"), self._pem("certificate"))],
            root_certificates=self._pem("client_ca") if "client_ca" in self._files else None,
        )

    def _pem(self, name: str) -> bytes:
        path = self._files[name]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TlsError(f"server.{name}", f"{path}: {error.strerror}") from error
        if b"-----BEGIN" not in data:
            raise TlsError(f"server.{name}", f"{path} holds no PEM")
        return data

    def _check_pair(self) -> None:
        """Look at what gRPC itself would take whatever it is, to fail every handshake then."""
        import ssl

        self._pem("key")
        self._pem("certificate")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # An empty password: a key that needs one is refused in place of being asked for on the terminal.
            context.load_cert_chain(self._files["certificate"], self._files["key"], password="")
            if "client_ca" in self._files:
                self._pem("client_ca")
                context.load_verify_locations(self._files["client_ca"])
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).lower().replace("_", " ")
            raise TlsError("server.certificate", f"does not go with server.key, or one is damaged: {reason}") from error
