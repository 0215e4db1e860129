"""The demo's figures, for programs (``summary.json``) and for people (a table)."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from esperml.demo.story import ROLES, TITLES, DemoStory, HostStory, Role
from esperml.trainer.arena.twins import TwinResult


def summarise(story: DemoStory) -> dict[str, Any]:
    """The figures as plain data.

    ``hosts`` and the counts are those of the first repeat; ``decisions_*`` count the twins under Tamiyo alone.
    ``overhead_pct`` is the mean share of the training time that was Esper's own, over the twins that were watched, in
    per cent; None where no report said. With more than one repeat, ``repeats`` has the figures of each and ``wins``
    counts, per host, the repeats in which the adapted twin had the lower test loss.
    """
    summary: dict[str, Any] = _figures(story.hosts)
    summary["server_lost"] = story.server_lost
    if len(story.repeats) > 1:
        summary["repeats"] = [
            {"seed": seed, **_figures(hosts)} for seed, hosts in zip(story.seeds, story.repeats, strict=True)
        ]
        summary["wins"] = wins(story)
    return summary


def wins(story: DemoStory) -> dict[str, dict[str, int]]:
    """Per host: in how many of the repeats the adapted twin had a lower test loss than the others."""
    table: dict[str, dict[str, int]] = {}
    for hosts in story.repeats:
        for host in hosts:
            row = table.setdefault(host.name, {"over_static": 0, "over_random": 0, "of": 0})
            adapted = host.twins["adapted"].test.loss
            row["over_static"] += adapted < host.twins["static"].test.loss
            row["over_random"] += adapted < host.twins["random"].test.loss
            row["of"] += 1
    return table


def _figures(hosts: list[HostStory]) -> dict[str, Any]:
    counts = {"sent": 0, "applied": 0, "refused": 0}
    overheads = []
    for host in hosts:
        for kind, number in host.runs["adapted"].counts().items():
            counts[kind] += number
        overheads += [share for role in ROLES if (share := host.runs[role].overhead()) is not None]
    return {
        "hosts": [
            {"name": host.name, **{role: _twin(host.twins[role]) for role in ROLES if role in host.twins}}
            for host in hosts
        ],
        **{f"decisions_{kind}": number for kind, number in counts.items()},
        "overhead_pct": 100 * sum(overheads) / len(overheads) if overheads else None,
    }


def _twin(twin: TwinResult) -> dict[str, float | int]:
    return {
        "val_loss": twin.validation.loss,
        "val_accuracy": twin.validation.accuracy,
        "test_loss": twin.test.loss,
        "test_accuracy": twin.test.accuracy,
        "parameters": twin.parameters,
    }


def table(story: DemoStory) -> Table:
    """The figures of the first repeat as a table for a terminal."""
    result = Table(
        box=None,
        padding=(0, 1),
        title="Three twins of each host, from the same weights and data order",
        caption="Loss (nats) and accuracy; decisions sent/applied/refused; overhead: Esper's share of the time.",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("host", no_wrap=True)
    result.add_column("twin", no_wrap=True)
    for heading in ("validation", "test", "params", "decisions", "overhead"):
        result.add_column(heading, justify="right", no_wrap=True)
    for host in story.hosts:
        best = min(host.twins, key=lambda role: host.twins[role].test.loss)
        for role in ROLES:
            result.add_row(*_row(host, role, best=role == best), end_section=role == ROLES[-1])
    return result


def _row(host: HostStory, role: Role, *, best: bool) -> list[Text]:
    twin, run = host.twins[role], host.runs[role]
    counts, overhead = run.counts(), run.overhead()
    cells = [
        host.name if role == ROLES[0] else "",
        TITLES[role],
        f"{twin.validation.loss:.3f}  {twin.validation.accuracy:.0%}",
        f"{twin.test.loss:.3f}  {twin.test.accuracy:.0%}",
        f"{twin.parameters:,}",
        "" if role == "static" else f"{counts['sent']}/{counts['applied']}/{counts['refused']}",
        "unknown" if overhead is None else f"{overhead:.1%}",
    ]
    return [Text(cell, style="bold green" if best and index > 0 else "") for index, cell in enumerate(cells)]
