"""``esper cluster``."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("esper-cluster"),
    show_default=True,
    help="Folder of the servers' streams, configurations and logs.",
)
@click.option("--gateways", type=click.IntRange(1, 8), default=2, show_default=True, help="Servers of the bus.")
def cluster(data_dir: Path, gateways: int) -> None:
    r"""Run three NATS servers and servers of the bus on them, on this machine alone.

    When all answer, one line of JSON goes to standard output: what to give clients as --target, the NATS servers, and
    where those say how they are. The first of the bus's servers has Tamiyo. Ctrl-C or SIGTERM stops them all; the
    streams stay in the folder, and are there the next time.

    \b
    Examples:
        esper cluster
        esper cluster --data-dir /tmp/cluster --gateways 3
    """
    from esperml.oona.jetstream.nats_server import NatsServerError
    from esperml.server.cluster import ClusterError, run

    try:
        asyncio.run(run(data_dir.resolve(), gateways, lambda facts: click.echo(json.dumps(facts))))
    except (NatsServerError, ClusterError, OSError) as error:
        raise click.ClickException(str(error)) from error
