"""``esper serve``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Final

import click

_FILE: Final = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [default: 50051]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the bus's logs.  [default: esper-data]")
@click.option("--policy", help="Policy that decides: shipped, chance, nothing, or a checkpoint's folder.")
@click.option("--engine", type=click.Choice(["sqlite", "jetstream"]), help="What holds the logs.  [default: sqlite]")
@click.option("--nats", help="Servers of the NATS cluster, separated by commas, for --engine jetstream.")
@click.option("--bus-only", is_flag=True, help="Serve no Tamiyo: of the servers of a cluster, one does.")
@click.option("--certificate", type=_FILE, help="Certificate chain of the server (PEM); with --key, it uses TLS.")
@click.option("--key", type=_FILE, help="Private key of the certificate (PEM).")
@click.option("--client-ca", type=_FILE, help="Authorities (PEM) of the certificates that clients must have then.")
@click.option("--tokens", type=_FILE, help="File of tokens, of which every call must show one; see `esper token`.")
@click.option("--insecure", is_flag=True, default=None, help="Allow an address beyond loopback without TLS and tokens.")
@click.option("--metrics-port", type=int, help="Port on loopback at which Prometheus finds metrics.  [default: none]")
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file of settings.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level to log.")
@click.option("--log-format", type=click.Choice(["console", "json"]), help="Log for people or for machines.")
def serve(
    host: str | None,
    port: int | None,
    data_dir: Path | None,
    policy: str | None,
    engine: str | None,
    nats: str | None,
    bus_only: bool,
    certificate: Path | None,
    key: Path | None,
    client_ca: Path | None,
    tokens: Path | None,
    insecure: bool | None,
    metrics_port: int | None,
    file: Path | None,
    log_level: str | None,
    log_format: str | None,
) -> None:
    """Run Oona and Tamiyo in one process.

    When every service answers, one line of JSON goes to standard output: {"listening": "127.0.0.1:50051"}. The log
    goes to standard error. Ctrl-C or SIGTERM stops it in good order; what was confirmed is on disk either way.

    \b
    Examples:
        esper serve --port 50051 --data-dir esper-data
        esper serve --policy policies/mine
        esper serve --engine jetstream --nats nats://one:4222,nats://two:4222
        esper serve --host 0.0.0.0 --certificate server.pem --key server.key --tokens tokens.json
        grpcurl -plaintext -d @ localhost:50051 esperml.v1.Tamiyo/Decide < examples/decide.json
    """
    from esperml.settings import SettingsError, configure_logging, load

    flags = {
        "server.host": host,
        "server.port": port,
        "server.data_dir": data_dir,
        "server.certificate": certificate,
        "server.key": key,
        "server.client_ca": client_ca,
        "server.tokens": tokens,
        "server.insecure": insecure,
        "server.metrics_port": metrics_port,
        "oona.engine": engine,
        "oona.jetstream.servers": nats,
        "tamiyo.policy": policy,
        "tamiyo.enabled": False if bus_only else None,
        "log.level": log_level,
        "log.format": log_format,
    }
    try:
        settings = load(file=file, flags=flags)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    configure_logging(settings.log)

    from esperml.oona import LogError
    from esperml.server import app
    from esperml.server.listening import ExposedAddressError
    from esperml.server.tls import TlsError
    from esperml.server.tokens import TokensError
    from esperml.tamiyo.checkpoint import CheckpointError
    from esperml.tamiyo.store import UnknownPolicyError

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await app.serve(settings, stop=stop, ready=_say_ready)

    try:
        asyncio.run(run())
    except (
        OSError,
        ExposedAddressError,
        TlsError,
        TokensError,
        LogError,
        CheckpointError,
        UnknownPolicyError,
    ) as error:
        raise click.ClickException(str(error)) from error


def _say_ready(address: str) -> None:
    sys.stdout.write(json.dumps({"listening": address}) + "\n")
    sys.stdout.flush()
