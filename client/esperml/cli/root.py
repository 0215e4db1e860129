"""The root of the command line.

It imports a command's module only when that command runs, so that ``--help`` is fast and a light install can say which
extra brings what it lacks.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import click


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a command lives.

    Attributes:
        target: ``module:attribute`` of the click command.
        extra: the extra of the distribution that brings what it imports.
        summary: what it does, in one line.
    """

    target: str
    extra: str
    summary: str


COMMANDS: Final = {
    "demo": Mount("esperml.demo.cli:demo", "trainer", "Grow two real networks under Tamiyo and show what came of it."),
    "serve": Mount("esperml.server.cli:serve", "server", "Run Oona and Tamiyo."),
    "cluster": Mount("esperml.server.cluster_cli:cluster", "server", "Run three NATS servers and the bus on them."),
    "trainer": Mount("esperml.trainer.cli:trainer", "trainer", "Collect experience, train Tamiyo on it, look at both."),
    "topics": Mount(
        "esperml.cli.topics:topics", "", "Look into the bus: lags, records as they come, dead letters; purge."
    ),
    "record": Mount("esperml.cli.record:record", "", "Record what goes over the bus into a file that any tool reads."),
    "replay": Mount("esperml.cli.replay:replay", "", "Put a recording back on a bus, at its pace, faster, or renamed."),
    "token": Mount("esperml.server.token_cli:token", "", "Make, list and revoke tokens that let clients in."),
    "log": Mount("esperml.server.log_cli:log", "server", "Check the bus's log file; save what a damaged one holds."),
    "bench": Mount("esperml.bench.cli:bench", "trainer", "Measure latency against a floor in the same run."),
    "config": Mount("esperml.cli.config:config", "", "Show the settings in force and where each came from."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name. Raises ``click.ClickException`` naming the extra if its packages are missing."""
        mount = COMMANDS.get(cmd_name)
        if mount is None:
            return None
        module, _, attribute = mount.target.partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not mount.extra or (error.name or "").startswith("esperml."):
                raise
            raise click.ClickException(
                f"`esper {cmd_name}` needs {error.name}, which the extra [{mount.extra}] brings: "
                f"pip install 'esperml[{mount.extra}]'"
            ) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{mount.target} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and their summaries without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].summary) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("esperml"), prog_name="esper")
def main() -> None:
    """Neural networks that grow while they train.

    KasminaLayers wrap the layers of your PyTorch model and stream telemetry over Oona, a durable typed bus. Tamiyo, a
    graph-network controller, decides when, where and what to graft or cut. Everything it decides is recorded, and the
    trainer makes it better from that.

    \b
    See it work:                   esper demo
    Run a server for your model:   esper serve --port 50051 --data-dir DIR
    Then, in your training loop:
        from esperml import kasmina
        model = kasmina.wrap(model, example_input)
        with kasmina.connect("localhost:50051", model, optimizer, run="my-run", mode="act") as session:
            ...  # session.step(loss=loss) after each optimizer.step()
    """
