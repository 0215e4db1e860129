"""What was measured, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from esperml.bench.oona.measure import RATIOS

_IN_WORDS = {
    "ratio_redis_everysec": "Redis, appendfsync everysec",
    "ratio_redis_always": "Redis, appendfsync always",
    "ratio_jetstream": "JetStream, default sync",
    "ratio_jetstream_always": "JetStream, sync always",
    "ratio_floor": "the relay that stores nothing",
}


class Report:
    """The result of :func:`esperml.bench.oona.measure.measure`, drawn by rich.

    Args:
        found: the result.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the cases, the ratios and what was skipped."""
        yield self._cases()
        yield self._ratios()
        found = self._found
        yield Text(
            f"fdatasync here: p50 {found['fdatasync_p50_us']:.0f} µs, p99 {found['fdatasync_p99_us']:.0f} µs. "
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores, {found['machine']['file_system']}."
        )
        for peer in found["skipped"]:
            yield Text(f"skipped: {peer['system']} ({peer['durability']}): {peer['reason']}")

    def _cases(self) -> Table:
        table = Table(title=f"publish → deliver → acknowledge, medians of {self._found['rounds']} blocks")
        table.add_column("system")
        for heading in ("bytes", "frame", "events/s", "interval", "one: p50", "p99 ms"):
            table.add_column(heading, justify="right")
        last = None
        for case in self._found["cases"]:
            system = f"{case['system']}, {case['durability']}"
            if last is not None and last != system:
                table.add_section()
            low, high = case["e2e_interval"]
            table.add_row(
                system if last != system else "",
                f"{case['payload']:,}",
                f"{case['frame']}",
                f"{case['e2e_per_s']:,.0f}",
                f"{low:,.0f} – {high:,.0f}",
                f"{case['single_p50_us'] / 1e3:.2f}",
                f"{case['single_p99_us'] / 1e3:.2f}",
            )
            last = system
        return table

    def _ratios(self) -> Table:
        table = Table(title="Oona on SQLite, synced, as a multiple of")
        table.add_column("what")
        table.add_column("ratio", justify="right")
        table.add_column("interval", justify="right")
        for key in RATIOS:
            if (ratio := self._found[key]) is None:
                table.add_row(_IN_WORDS[key], "not measured", "")
            else:
                low, high = self._found[f"{key}_interval"]
                table.add_row(_IN_WORDS[key], f"{ratio:.2f}", f"{low:.2f} – {high:.2f}")
        if (single := self._found["single_p99_over_floor"]) is not None:
            table.add_row("one event, p99: the relay's plus fdatasync's", f"{single:.2f}", "")
        return table
