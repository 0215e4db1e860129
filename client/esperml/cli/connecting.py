"""Where and as whom a command connects: the same options for every command that speaks with a server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click
from click.core import ParameterSource

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


class ServerGroup(click.Group):
    """A group whose commands take :func:`server_options`, and which takes them before a command's name as well.

    What stands there is handed on to the command, where the same option may be given again and then counts.
    """

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        taken = server_options(lambda server: server)
        self.params += taken.__click_params__[::-1]  # type: ignore[attr-defined]
        callback = self.callback
        self.callback = None if callback is None else lambda **_: callback()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the command, and put it behind the command's name."""
        super().parse_args(ctx, args)
        given: list[str] = []
        for option in self.params:
            name = option.name or ""
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                given += [option.opts[0], *([] if getattr(option, "is_flag", False) else [str(ctx.params[name])])]
        ctx.args = [*given, *ctx.args]
        return ctx.args
