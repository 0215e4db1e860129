"""Where and as whom a command connects: the same options for every command that speaks with a server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from esperml.client import Credentials

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that a command was told to speak with.

    Attributes:
        target: its address.
        credentials: token and TLS.
    """

    target: str
    credentials: Credentials


_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_OPTIONS: Final = (
    click.option(
        "--server",
        "target",
        default="localhost:50051",
        show_default=True,
        envvar="ESPER_TARGET",
        show_envvar=True,
        help="Address of the server.",
    ),
    click.option(
        "--token",
        envvar="ESPER_TOKEN",
        show_envvar=True,
        help="Bearer token. Others on this machine see it here: better give it by the variable or --token-file.",
    ),
    click.option(
        "--token-file", type=_FILE, envvar="ESPER_TOKEN_FILE", show_envvar=True, help="File that holds the token."
    ),
    click.option(
        "--tls", is_flag=True, envvar="ESPER_TLS", show_envvar=True, help="TLS, trusting the system's authorities."
    ),
    click.option(
        "--ca", type=_FILE, envvar="ESPER_CA", show_envvar=True, help="TLS, trusting the authorities in this PEM file."
    ),
    click.option("--cert", type=_FILE, envvar="ESPER_CERT", show_envvar=True, help="The client's certificate (PEM)."),
    click.option("--key", type=_FILE, envvar="ESPER_KEY", show_envvar=True, help="Its private key (PEM)."),
)


def server_options(command: Callable[_P, _R]) -> Callable[..., _R]:
    """Give a command the options that say where and as whom to connect; it is called with ``server``, a
    :class:`Server`, in their place.

    What does not go together is a usage error.
    """

    @functools.wraps(command)
    def connecting(
        *args: Any,
        target: str,
        token: str | None,
        token_file: Path | None,
        tls: bool,
        ca: Path | None,
        cert: Path | None,
        key: Path | None,
        **kwargs: Any,
    ) -> _R:
        from esperml.client import Credentials, CredentialsError

        try:
            credentials = Credentials(
                token=token or None, token_file=token_file, tls=tls, ca=ca, certificate=cert, key=key
            )
        except CredentialsError as error:
            raise click.UsageError(str(error)) from error
        return command(*args, server=Server(target, credentials), **kwargs)  # type: ignore[arg-type]

    decorated: Callable[..., _R] = connecting
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
