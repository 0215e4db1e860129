"""The demo's report: one HTML file that needs nothing but itself."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template
from typing import Final

from esperml.demo import pictures, style
from esperml.demo.story import ROLES, TITLES, DemoStory, HostStory, Role, RunStory
from esperml.demo.summary import wins
from esperml.tamiyo.run_control import LIFECYCLE
from esperml.v1 import decision_pb2

_PAGE: Final = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Esper: two networks that grew while they trained</title>
<style>
$css</style>
</head>
<body>
<main>
<h1>Two networks, three lives each</h1>
<p class="lead">Each host has a layer too narrow for its task. It was trained three times from the same weights, on the
same batches in the same order: left alone; under Tamiyo, which watched it from another process and grafted seeds while
it trained; and under a policy that draws place and blueprint by chance within the same budgets.</p>
<p class="narrow">The table and the pictures are wider than this screen: move them sideways.</p>
$warning
<section class="verdicts">
$verdicts
</section>
<section class="card">
<h2>The figures</h2>
<p>Validation guided nothing but Tamiyo's view of the run; the test set was scored once, at the end. Loss is mean
cross-entropy in nats, lower is better; the lowest test loss of each host is bold.</p>
<div class="scroll">
$table
</div>
$wins
</section>
$hosts
<footer>$footer</footer>
</main>
</body>
</html>
"""
)


def render(story: DemoStory) -> str:
    """The whole report as HTML."""
    return _PAGE.substitute(
        css=files("esperml.demo").joinpath("page.css").read_text(encoding="utf-8"),
        warning=_warning(story),
        verdicts="\n".join(_verdict(host) for host in story.hosts),
        table=_table(story),
        wins=_wins(story),
        hosts="\n".join(_host(host) for host in story.hosts),
        footer=_footer(story),
    )


def _warning(story: DemoStory) -> str:
    if not story.server_lost:
        return ""
    return (
        f'<p class="warning"><strong>The server was lost {escape(story.server_lost)}.</strong> Training went on '
        "unchanged from there, as it should, but nothing more was decided or recorded: what follows shows what there "
        "is.</p>"
    )


def _verdict(host: HostStory) -> str:
    adapted, static, random = (host.twins[role].test for role in ("adapted", "static", "random"))
    headline, mood = _change((adapted.loss - static.loss) / static.loss)
    if not host.runs["adapted"].applied:
        mood = ""
    return (
        f'<div class="verdict {mood}"><div>{escape(host.name)}</div>'
        f'<div class="figure">{headline}</div>'
        f'<div class="what">Test loss under Tamiyo {adapted.loss:.3f}, left alone {static.loss:.3f}, '
        f"under masked chance {random.loss:.3f}. Accuracy {static.accuracy:.1%} → {adapted.accuracy:.1%}.</div></div>"
    )


def _change(relative: float) -> tuple[str, str]:
    """A relative change of test loss in words, and the class of its verdict; what rounds to nothing is none."""
    size = f"{abs(relative):.1%}"
    if size == "0.0%":
        return "no difference", ""
    return (f"{size} lower test loss", "better") if relative < 0 else (f"{size} higher test loss", "worse")


def _table(story: DemoStory) -> str:
    headings = ("val. loss", "val. acc.", "test loss", "test acc.", "parameters", "sent", "applied", "refused")
    head = '<th class="text">host</th><th class="text twin">twin</th>'
    head += "".join(f"<th>{name}</th>" for name in headings)
    rows = [
        _row(host, role, best=role == min(host.twins, key=lambda name: host.twins[name].test.loss))
        for host in story.hosts
        for role in ROLES
    ]
    return f"<table><thead><tr>{head}<th>overhead</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(host: HostStory, role: Role, *, best: bool) -> str:
    twin, run = host.twins[role], host.runs[role]
    counts, overhead = run.counts(), run.overhead()
    cells = [
        f"{twin.validation.loss:.3f}",
        f"{twin.validation.accuracy:.1%}",
        f"{twin.test.loss:.3f}",
        f"{twin.test.accuracy:.1%}",
        f"{twin.parameters:,}",
        *("–" if role == "static" else str(counts[kind]) for kind in ("sent", "applied", "refused")),
        "unknown" if overhead is None else f"{overhead:.1%}",
    ]
    name = escape(host.name) if role == ROLES[0] else ""
    swatch = f'<span class="swatch" style="background:{style.TWINS[role]}"></span>'
    return (
        f'<tr{" class=best" if best else ""}><td class="text">{name}</td>'
        f'<td class="text twin">{swatch}{TITLES[role]}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    )


def _wins(story: DemoStory) -> str:
    if len(story.repeats) < 2:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(name)}</td><td>{row["over_static"]} of {row["of"]}</td>'
        f"<td>{row['over_random']} of {row['of']}</td></tr>"
        for name, row in wins(story).items()
    )
    return (
        f"<h3>Over {len(story.repeats)} repeats with different seeds, Tamiyo's twin had the lower test loss</h3>"
        '<div class="scroll"><table><thead><tr><th class="text">host</th><th>than left alone</th>'
        f"<th>than masked chance</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p>The pictures below are of the first repeat, seed {story.seeds[0]}.</p>"
    )


def _host(host: HostStory) -> str:
    run = host.runs["adapted"]
    widths = "-".join(map(str, host.spec.widths))
    parts = [
        f'<section class="card"><h2>{escape(host.name)}</h2>',
        f"<p>Hidden layers {widths}, {host.twins['static'].host_parameters:,} parameters, seed {host.spec.seed}.</p>",
        _figure(
            "Held-out loss",
            pictures.loss_curves(host),
            "Up to the first mark the curves are one: a graft changes nothing at the step at which it is planted.",
        ),
        _graphs(host.name, run),
        _timeline(host),
        "<h3>What Tamiyo decided, and why</h3>",
        _decisions(run),
        "</section>",
    ]
    return "\n".join(parts)


def _figure(title: str, svg: str, caption: str) -> str:
    heading = f"<h3>{title}</h3>" if title else ""
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'{heading}<figure><div class="scroll wide">{svg}</div>{caption}</figure>'


def _graphs(name: str, run: RunStory) -> str:
    if not run.graphs:
        return "<h3>The network</h3><p>The bus holds no structure of this run.</p>"
    first, last = (run.states[0], run.states[-1]) if run.states else (None, None)
    before = pictures.host_graph(name, f"before, step {first.step if first else 0}", run.graphs[0], first)
    after = pictures.host_graph(name, f"after, step {last.step if last else 'unknown'}", run.graphs[-1], last)
    return (
        "<h3>The network before and after</h3>"
        f'<div class="key"><span>Height: width of the layer. Colour and figure: health, as Tamiyo saw it.</span>'
        f"{pictures.health_scale(name)}</div>"
        + _figure("", before, "")
        + _figure(
            "",
            after,
            "Bold lines are seeds: they read what flows where they begin and add to the output where they end.",
        )
    )


def _timeline(host: HostStory) -> str:
    svg = pictures.seed_timeline(host)
    if not svg:
        return "<h3>The seeds</h3><p>None was planted.</p>"
    return _figure("The seeds", svg, "A seed blends in from nothing, is on trial, and is then kept for good or culled.")


def _decisions(run: RunStory) -> str:
    quiet = len(run.decisions) - len(run.actions)
    items = "".join(_decision(decision, run) for decision in run.actions)
    listed = f'<ol class="decisions">{items}</ol>' if items else "<p>Nothing was done.</p>"
    if not quiet:
        return listed
    words = "One more decision was" if quiet == 1 else f"{quiet} more decisions were"
    return f"{listed}<p class='rest'>{words} to leave the network as it was.</p>"


def _decision(decision: decision_pb2.AdaptationDecision, run: RunStory) -> str:
    details = [style.fate_in_words(decision, run.applied.get(decision.decision_id))]
    if decision.HasField("confidence"):
        details.append(f"confidence {decision.confidence:.2f}")
    if effect := run.effects.get(decision.decision_id):
        details.append(f"without it the held-out loss would be {effect.loss_reduction:+.3f}")
    if (reward := run.rewards.get(decision.decision_id)) is not None:
        details.append(f"reward {reward:+.3f}")
    return (
        f'<li><span class="step">step {decision.step}</span><span>'
        f'<span class="do">{escape(style.action_in_words(decision))}</span> '
        f'<span class="fate">by {escape(decision.policy)}</span><br>'
        f'<span class="reason">{escape(decision.reason)}</span><br>'
        f'<span class="fate">{escape("; ".join(details))}</span></span></li>'
    )


def _footer(story: DemoStory) -> str:
    policies = sorted(
        {
            f"{decision.policy} {decision.policy_version[:12]}".strip()
            for host in story.hosts
            for decision in host.runs["adapted"].decisions
            if decision.policy != LIFECYCLE
        }
    )
    decided = f"Policy: {escape(', '.join(policies))}. " if policies else ""
    return (
        f"{decided}The demo took {story.seconds:.0f} s. What the bus carried was recorded beside this file, and "
        "<code>esper trainer train</code> learns from it."
    )
