"""What a person sees while the demo runs: a live board on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from esperml.demo import style
from esperml.demo.braille import chart
from esperml.demo.story import ROLES, TITLES, Role
from esperml.trainer.arena.twins import Progress
from esperml.v1 import decision_pb2, event_pb2, health_pb2

_DECISIONS_SHOWN: Final = 8
_HISTORY: Final = 24
_CHART_HEIGHT: Final = 9
_REFRESHES_PER_S: Final = 4
_Shown = Literal["effective_rank", "dead_fraction", "expressivity_bottleneck", "gradient_norm"]
_SPARK: Final = "▁▂▃▄▅▆▇█"


class Watcher(Protocol):
    """Is told what happens. Called from several threads."""

    def say(self, text: str) -> None:
        """Something that a person should read."""

    def progress(self, host: str, role: Role, moment: Progress) -> None:
        """A twin got further."""

    def event(self, host: str, role: Role, event: event_pb2.Event) -> None:
        """The bus said something of a twin."""


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print it."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def progress(self, host: str, role: Role, moment: Progress) -> None:
        """Print nothing: the curves are in the report."""

    def event(self, host: str, role: Role, event: event_pb2.Event) -> None:
        """Print decisions to do something, and what became of them."""
        match event.WhichOneof("payload"):
            case "decision" if event.decision.action.WhichOneof("kind") not in (None, "none"):
                line = f"step {event.decision.step}: {style.action_in_words(event.decision)}: {event.decision.reason}"
            case "applied":
                status = "applied" if _done(event.applied) else f"refused: {event.applied.reason}"
                line = f"step {event.applied.step}: {status}"
            case _:
                return
        self._console.print(f"  {host}, {TITLES[role]}, {line}", highlight=False, markup=False, soft_wrap=True)


@dataclass(slots=True)
class _HostView:
    curves: dict[Role, list[tuple[float, float]]] = field(default_factory=lambda: {role: [] for role in ROLES})
    report: health_pb2.HealthReport = field(default_factory=health_pb2.HealthReport)
    role: Role = "static"
    layers: dict[str, health_pb2.EnhancedHealthSignal] = field(default_factory=dict)
    histories: dict[str, deque[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Curves:
    """The curves of a host, as wide as there is room."""

    curves: dict[Role, list[tuple[float, float]]]
    steps: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        losses = sorted(loss for points in self.curves.values() for _, loss in points if math.isfinite(loss))
        if not losses:
            yield Text("waiting for the first report", style="dim")
            return
        # The first reports are far above what matters.
        high = losses[int(0.95 * (len(losses) - 1))]
        yield chart(
            [(style.TERMINAL[role], self.curves[role]) for role in ROLES],
            width=options.max_width,
            height=_CHART_HEIGHT,
            x_range=(0, self.steps),
            y_range=(losses[0], high),
        )


class Board:
    """The live board. Thread-safe."""

    def __init__(self, hosts: Sequence[str], steps: int) -> None:
        self._lock = threading.Lock()
        self._steps = steps
        self._views = {host: _HostView() for host in hosts}
        self._shown = hosts[0]
        self._message = ""
        self._began = time.monotonic()
        self._decisions: deque[tuple[str, Role, decision_pb2.AdaptationDecision]] = deque(maxlen=_DECISIONS_SHOWN)
        self._fates: dict[str, decision_pb2.Applied] = {}

    def restart(self) -> None:
        """Forget the curves: another repeat begins."""
        with self._lock:
            self._views = {host: _HostView() for host in self._views}

    def say(self, text: str) -> None:
        """Show it in the headline."""
        with self._lock:
            self._message = text

    def progress(self, host: str, role: Role, moment: Progress) -> None:
        """Draw the curve on."""
        with self._lock:
            self._shown = host
            self._views[host].curves[role].append((moment.step, moment.validation_loss))

    def event(self, host: str, role: Role, event: event_pb2.Event) -> None:
        """Show telemetry and decisions."""
        with self._lock:
            view = self._views[host]
            match event.WhichOneof("payload"):
                case "health_report":
                    self._take_report(view, role, event.health_report)
                case "decision" if event.decision.action.WhichOneof("kind") not in (None, "none"):
                    self._decisions.append((host, role, event.decision))
                case "applied":
                    self._fates[event.applied.decision_id] = event.applied
                case _:
                    pass

    def __rich__(self) -> RenderableType:
        """The board as it stands."""
        with self._lock:
            headline = Text.assemble(
                ("esper demo  ", "bold"), f"{time.monotonic() - self._began:4.0f} s   ", (self._message, "cyan")
            )
            curves = Table.grid(expand=True)
            for _ in self._views:
                curves.add_column(ratio=1)
            curves.add_row(*(self._curves(host, view) for host, view in self._views.items()))
            return Group(headline, curves, self._telemetry(self._views[self._shown]), self._decision_list())

    def _take_report(self, view: _HostView, role: Role, report: health_pb2.HealthReport) -> None:
        if role != view.role:
            view.histories.clear()
            view.layers.clear()
        view.report, view.role = report, role
        for signal in report.layers:
            # Not every layer is sampled each time: what was measured before stays until it is measured again.
            view.layers.setdefault(signal.layer, health_pb2.EnhancedHealthSignal()).MergeFrom(signal)
            if signal.HasField("gradient_norm"):
                view.histories.setdefault(signal.layer, deque(maxlen=_HISTORY)).append(signal.gradient_norm)

    def _curves(self, host: str, view: _HostView) -> Panel:
        legend = Text()
        for role in ROLES:
            points = view.curves[role]
            legend.append(f"● {TITLES[role]} ", style=style.TERMINAL[role])
            legend.append(f"{points[-1][1]:.3f}  " if points else "–  ")
        drawing = _Curves(view.curves, self._steps)
        return Panel(Group(drawing, legend), title=f"{host}: held-out loss", title_align="left", border_style="dim")

    def _telemetry(self, view: _HostView) -> Panel:
        table = Table(box=None, padding=(0, 2), expand=True)
        table.add_column("layer")
        for heading in ("rank", "dead", "bottleneck", "gradient"):
            table.add_column(heading, justify="right")
        table.add_column("", ratio=1)
        for signal in view.layers.values():
            table.add_row(
                signal.layer,
                _shown(signal, "effective_rank"),
                _shown(signal, "dead_fraction"),
                _shown(signal, "expressivity_bottleneck"),
                _shown(signal, "gradient_norm"),
                Text(_spark(view.histories.get(signal.layer, ())), style="cyan"),
            )
        if not view.layers:
            table.add_row(Text("none yet", style="dim"))
        title = "telemetry"
        if view.layers:
            title += f" · {TITLES[view.role]}, step {view.report.step}, seeds: {len(view.report.seeds)}"
        return Panel(table, title=title, title_align="left", border_style="dim")

    def _decision_list(self) -> Panel:
        lines = Text(no_wrap=True, overflow="ellipsis")
        for host, role, decision in self._decisions:
            lines.append(f"{host} {decision.step:>5}  ", style="dim")
            lines.append(style.action_in_words(decision), style=f"bold {style.TERMINAL[role]}")
            fate = style.fate_in_words(decision, self._fates.get(decision.decision_id))
            lines.append(f"  {fate}\n", style="dim")
        return Panel(lines or Text("none yet", style="dim"), title="decisions", title_align="left", border_style="dim")


@contextmanager
def watch(
    console: Console, hosts: Sequence[str], steps: int, *, live: bool
) -> Iterator[tuple[Watcher, Callable[[], None]]]:
    """A watcher, and what to call when another repeat begins.

    The watcher is a live board where ``live`` is asked for and the console is a terminal, plain lines elsewhere.
    """
    if not (live and console.is_terminal):
        yield Lines(console), lambda: None
        return
    board = Board(hosts, steps)
    with Live(board, console=console, refresh_per_second=_REFRESHES_PER_S):
        yield board, board.restart


def _done(applied: decision_pb2.Applied) -> bool:
    return applied.status == decision_pb2.COMMAND_STATUS_APPLIED


def _shown(signal: health_pb2.EnhancedHealthSignal, measure: _Shown) -> str:
    """The measure, or a dash: what was not measured is not zero."""
    return f"{getattr(signal, measure):.2f}" if signal.HasField(measure) else "–"


def _spark(values: Sequence[float] | deque[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_SPARK[min(7, int(8 * (value - low) / span))] for value in values)
