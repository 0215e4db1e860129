"""The report's pictures, as SVG to stand inline in a page."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from esperml.demo import style
from esperml.demo.story import ROLES, TITLES, HostStory, RunStory
from esperml.demo.style import INK, MUTED, RULE
from esperml.v1 import decision_pb2, graph_pb2, health_pb2

_HEALTH_COLOURS: Final = LinearSegmentedColormap.from_list("health", style.HEALTH)
_START_LEFT_OUT: Final = 0.1
_UNKNOWN_HEALTH: Final = "#eef1f4"
# What matplotlib would add: a date, which makes files differ, and addresses outside.
_NO_METADATA: Final = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def loss_curves(host: HostStory) -> str:
    """Held-out loss of the three twins over the steps, with what was done to two of them marked."""
    with _figure("curves-" + host.name, 9.2, 4.0) as figure:
        axes = figure.add_subplot()
        lowest, highest = _loss_range(host)
        for role in ROLES:
            twin = host.twins.get(role)
            if twin is None or not twin.curve:
                continue
            colour = style.TWINS[role]
            steps = [moment.step for moment in twin.curve]
            losses = [moment.validation_loss for moment in twin.curve]
            axes.plot(
                steps, losses, color=colour, linewidth=2.4 if role == "adapted" else 1.7, zorder=4, label=TITLES[role]
            )
            _mark_actions(axes, host.runs.get(role, RunStory()), steps, losses, colour)
        axes.set_ylim(lowest, highest)
        _label_ends(axes, host)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("held-out loss (nats)")
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_xlim(left=0)
        axes.legend(handles=_marker_legend(host), loc="upper right", frameon=False, fontsize=9, ncols=2)
        return _svg(figure)


def host_graph(host: str, title: str, graph: graph_pb2.HostGraph, state: graph_pb2.ModelGraphState | None) -> str:
    """The layers of ``host`` from input to output, as tall as they are wide, coloured by health, with its seeds."""
    health = _healths(graph, state)
    columns = _columns(graph)
    rows: dict[int, list[int]] = {}
    for layer, column in enumerate(columns):
        rows.setdefault(column, []).append(layer)
    centres = {
        layer: (1.5 * column, 2.6 * ((len(members) - 1) / 2 - index))
        for column, members in rows.items()
        for index, layer in enumerate(members)
    }
    with _figure(f"graph-{host}-{title}", 9.2, 2.7 + 0.9 * (max(map(len, rows.values())) - 1)) as figure:
        axes = figure.add_axes((0, 0, 1, 0.92))
        axes.axis("off")
        heights = [_height(spec) for spec in graph.layers]
        _draw_edges(axes, graph, centres)
        for layer, spec in enumerate(graph.layers):
            _draw_layer(axes, spec, centres[layer], heights[layer], health[layer])
        if state is not None:
            _draw_seeds(axes, graph, state.seeds, centres, heights)
        axes.set_xlim(-1.2, 1.5 * max(columns) + 0.6)
        axes.autoscale(axis="y")
        axes.margins(y=0.12)
        axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
        return _svg(figure)


def health_scale(host: str) -> str:
    """The key to the colours of :func:`host_graph`, for the pictures of ``host``."""
    with _figure(f"health-scale-{host}", 2.2, 0.5) as figure:
        axes = figure.add_axes((0.12, 0.55, 0.76, 0.4))
        shades = [(index + 0.5) / 50 for index in range(50)]
        axes.bar(shades, 1, width=1 / 49, color=_HEALTH_COLOURS(shades))
        axes.set_xlim(0, 1)
        axes.set_yticks([])
        axes.set_xticks([0, 0.5, 1], ["0 sick", "0.5", "1 healthy"], fontsize=10)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure)


def seed_timeline(host: HostStory) -> str:
    """When each seed of the twins was planted, how it blended in and how it ended. Empty string where none was."""
    lives = [(role, *life) for role in ROLES if role in host.runs for life in _lives(host.runs[role])]
    if not lives:
        return ""
    with _figure("seeds-" + host.name, 9.2, 0.9 + 0.5 * len(lives)) as figure:
        axes = figure.add_subplot()
        labels = []
        seen: set[health_pb2.SeedStage.ValueType] = set()
        last_step = max(twin.curve[-1].step for twin in host.twins.values() if twin.curve)
        for row, (_, label, spans) in enumerate(lives):
            labels.append(label)
            for index, (begin, stage) in enumerate(spans):
                end = spans[index + 1][0] if index + 1 < len(spans) else last_step
                seen.add(stage)
                if stage == health_pb2.SEED_STAGE_CULLED:
                    axes.plot(begin, row, marker="X", color=style.STAGES[stage][1], markersize=9, zorder=4)
                else:
                    axes.barh(row, end - begin, left=begin, height=0.56, color=style.STAGES[stage][1], zorder=3)
        axes.set_yticks(range(len(lives)), labels, fontsize=9)
        for tick, (role, *_) in zip(axes.get_yticklabels(), lives, strict=True):
            tick.set_color(style.TWINS[role])
        axes.tick_params(axis="y", length=0, pad=6)
        axes.invert_yaxis()
        axes.set_xlim(0, last_step)
        axes.set_xlabel("optimizer step")
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        keys: list[Patch | Line2D] = [
            Patch(color=colour, label=name)
            for stage, (name, colour) in style.STAGES.items()
            if stage in seen and stage != health_pb2.SEED_STAGE_CULLED
        ]
        if health_pb2.SEED_STAGE_CULLED in seen:
            name, colour = style.STAGES[health_pb2.SEED_STAGE_CULLED]
            keys.append(Line2D([], [], marker="X", linestyle="", color=colour, label=name))
        axes.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9, ncols=len(keys))
        return _svg(figure)


def _loss_range(host: HostStory) -> tuple[float, float]:
    """What the picture shows: all losses but those of the first steps, which are far above what matters."""
    last = max((moment.step for twin in host.twins.values() for moment in twin.curve), default=0)
    losses = [
        moment.validation_loss
        for twin in host.twins.values()
        for moment in twin.curve
        if moment.step >= _START_LEFT_OUT * last and math.isfinite(moment.validation_loss)
    ]
    if not losses:
        return 0.0, 1.0
    room = max(0.08 * (max(losses) - min(losses)), 0.01)
    return max(0.0, min(losses) - room), max(losses) + room


def _mark_actions(axes: Axes, run: RunStory, steps: Sequence[int], losses: Sequence[float], colour: str) -> None:
    for decision in run.actions:
        applied = run.applied.get(decision.decision_id)
        at = applied.step if applied is not None else decision.step
        done = applied is not None and applied.status == decision_pb2.COMMAND_STATUS_APPLIED
        marker = style.MARKERS[str(decision.action.WhichOneof("kind"))]
        axes.plot(
            at, _interpolate(steps, losses, at), marker=marker, markersize=9, color=colour, zorder=6,
            markerfacecolor=colour if done else "white", markeredgewidth=1.2,
            markeredgecolor="white" if done else colour,
        )  # fmt: skip


def _interpolate(steps: Sequence[int], values: Sequence[float], at: float) -> float:
    for index in range(1, len(steps)):
        if at <= steps[index]:
            share = (at - steps[index - 1]) / (steps[index] - steps[index - 1])
            return values[index - 1] + max(0.0, share) * (values[index] - values[index - 1])
    return values[-1]


def _label_ends(axes: Axes, host: HostStory) -> None:
    """Name each curve at its end, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    ends = sorted(
        (twin.curve[-1].validation_loss, twin.curve[-1].step, role) for role, twin in host.twins.items() if twin.curve
    )
    floor = -math.inf
    for loss, step, role in ends:
        place = max(min(loss, high), floor + 0.06 * (high - low))
        floor = place
        axes.annotate(
            f"{TITLES[role]}  {loss:.3f}", (step, place), xytext=(8, 0), textcoords="offset points", va="center",
            color=style.TWINS[role], fontsize=10, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _marker_legend(host: HostStory) -> list[Line2D]:
    used = {str(decision.action.WhichOneof("kind")) for run in host.runs.values() for decision in run.actions}
    names = {"germinate": "planted", "fossilise": "kept for good", "cull": "culled", "set_alpha": "alpha set"}
    keys = [
        Line2D([], [], marker=style.MARKERS[kind], linestyle="", color=MUTED, markersize=8, label=name)
        for kind, name in names.items()
        if kind in used
    ]
    if any(_not_applied(run) for run in host.runs.values()):
        keys.append(
            Line2D([], [], marker="o", linestyle="", markerfacecolor="white", color=MUTED, label="hollow: not applied")
        )
    return keys


def _not_applied(run: RunStory) -> bool:
    done = decision_pb2.COMMAND_STATUS_APPLIED
    return any(
        decision.decision_id not in run.applied or run.applied[decision.decision_id].status != done
        for decision in run.actions
    )


def _lives(run: RunStory) -> Iterator[tuple[str, list[tuple[int, health_pb2.SeedStage.ValueType]]]]:
    """Every seed of a run as its label and the (step, stage) of each change of stage."""
    spans: dict[str, list[tuple[int, health_pb2.SeedStage.ValueType]]] = {}
    labels: dict[str, str] = {}
    for applied in run.applied.values():
        if applied.status != decision_pb2.COMMAND_STATUS_APPLIED or not applied.seed_id:
            continue
        decision = next((d for d in run.decisions if d.decision_id == applied.decision_id), None)
        match decision.action.WhichOneof("kind") if decision else None:
            case "germinate":
                spans[applied.seed_id] = [(applied.step, health_pb2.SEED_STAGE_GERMINATED)]
            case "fossilise":
                spans.setdefault(applied.seed_id, []).append((applied.step, health_pb2.SEED_STAGE_FOSSILISED))
            case "cull":
                spans.setdefault(applied.seed_id, []).append((applied.step, health_pb2.SEED_STAGE_CULLED))
            case _:
                pass
    for report in run.reports:
        for seed in report.seeds:
            stages = spans.setdefault(seed.seed_id, [])
            if seed.stage not in (stage for _, stage in stages):
                stages.append((max(0, report.step - seed.steps_in_stage), seed.stage))
            if run.graphs:
                where = style.place_in_words(style.seed_place(run.graphs[-1], seed.place))
                labels[seed.seed_id] = f"{seed.blueprint}, {seed.parameters:,} parameters,\n{where}"
    for seed_id, stages in sorted(spans.items(), key=lambda item: min(item[1])):
        yield labels.get(seed_id, seed_id), sorted(stages)


def _healths(graph: graph_pb2.HostGraph, state: graph_pb2.ModelGraphState | None) -> list[float | None]:
    unknown: list[float | None] = [None] * len(graph.layers)
    if state is None:
        return unknown
    column = state.layers.health
    by_name = {
        spec.name: value
        for index, (spec, value) in enumerate(zip(state.graph.layers, column.values, strict=False))
        if index not in set(column.absent)
    }
    return [by_name.get(spec.name) for spec in graph.layers]


def _columns(graph: graph_pb2.HostGraph) -> list[int]:
    """The column of each layer: the longest path to it along edges that run forwards."""
    columns = [0] * len(graph.layers)
    for _ in graph.layers:
        for source, target in zip(graph.edges.sources, graph.edges.targets, strict=True):
            if source < target:
                columns[target] = max(columns[target], columns[source] + 1)
    return columns


def _height(spec: graph_pb2.LayerSpec) -> float:
    return 0.34 + 0.24 * math.log2(max(1, spec.output_shape[0] if spec.output_shape else 1))


def _draw_layer(
    axes: Axes, spec: graph_pb2.LayerSpec, centre: tuple[float, float], height: float, health: float | None
) -> None:
    x, y = centre
    axes.add_patch(
        FancyBboxPatch(
            (x - 0.22, y - height / 2), 0.44, height, boxstyle="round,pad=0,rounding_size=0.06", linewidth=1.1,
            edgecolor=INK, facecolor=_UNKNOWN_HEALTH if health is None else _HEALTH_COLOURS(health),
            hatch="//" if health is None else None, zorder=3,
        )
    )  # fmt: skip
    shown = "?" if health is None else f"{health:.2f}"
    dark = health is not None and (health < 0.18 or health > 0.85)
    axes.text(x, y, shown, ha="center", va="center", fontsize=9, color="white" if dark else INK, zorder=5)
    shape = f"{_size(spec.input_shape)} → {_size(spec.output_shape)}"
    for words, below, size, colour, weight in ((spec.name, 4, 9.5, INK, "bold"), (shape, 17, 8.5, MUTED, "normal")):
        axes.annotate(
            words, (x, y - height / 2), xytext=(0, -below), textcoords="offset points", ha="center", va="top",
            fontsize=size, color=colour, fontweight=weight,
        )  # fmt: skip


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "?"


def _draw_edges(axes: Axes, graph: graph_pb2.HostGraph, centres: dict[int, tuple[float, float]]) -> None:
    fed = set(graph.edges.targets)
    arrows: list[tuple[tuple[float, float], tuple[float, float], str, float]] = []
    for layer, (x, y) in centres.items():
        if layer not in fed:
            arrows.append(((x - 0.75, y), (x - 0.24, y), "-", 0.0))
            axes.text(x - 0.8, y, "input", ha="right", va="center", fontsize=9, color=MUTED)
    for source, target, kind in zip(graph.edges.sources, graph.edges.targets, graph.edges.kinds, strict=True):
        (x0, y0), (x1, y1) = centres[source], centres[target]
        forward = kind == graph_pb2.EDGE_KIND_FORWARD
        arrows.append(((x0 + 0.24, y0), (x1 - 0.24, y1), "-" if forward else "--", 0.0 if forward else 0.35))
    for begin, end, line, bend in arrows:
        axes.add_patch(
            FancyArrowPatch(
                begin, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.3, linestyle=line, color=MUTED,
                connectionstyle=f"arc3,rad={bend}", zorder=2, shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip


def _draw_seeds(
    axes: Axes,
    graph: graph_pb2.HostGraph,
    seeds: Sequence[health_pb2.SeedSignal],
    centres: dict[int, tuple[float, float]],
    heights: Sequence[float],
) -> None:
    for order, seed in enumerate(seeds):
        source, target = graph.places.sources[seed.place], graph.places.targets[seed.place]
        between = [layer for layer in centres if centres[source][0] <= centres[layer][0] <= centres[target][0]]
        top = max(centres[layer][1] + heights[layer] / 2 for layer in between) + 0.35 + 0.5 * order
        begin, end = centres[source][0] - 0.45, centres[target][0] + 0.36
        colour = style.STAGES[seed.stage][1] if seed.stage in style.STAGES else MUTED
        xs = [begin, begin, end, end]
        ys = [centres[source][1], top, top, centres[target][1]]
        axes.plot(xs, ys, color=colour, linewidth=2.6, zorder=2.5, solid_joinstyle="round")
        axes.plot(end, centres[target][1], marker="o", color=colour, markersize=6, zorder=4)
        axes.text(
            (begin + end) / 2, top, f"{seed.blueprint} · {seed.parameters:,} par.", ha="center", va="center",
            fontsize=9, color="white", fontweight="bold", zorder=6,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "none"},
        )  # fmt: skip


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[Figure]:
    """A figure in inches. ``name`` salts the ids inside the SVG, so that two on one page do not share any."""
    settings: dict[str, Any] = {
        "svg.hashsalt": name,
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "hatch.color": "#c9d0d8",
    }
    with mpl.rc_context(cast(Any, settings)):
        yield Figure(figsize=(width, height))


def _svg(figure: Figure) -> str:
    """The figure as an element that stands in HTML, without the XML prologue, which names an outside address."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.06,
        metadata=_NO_METADATA,
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]
