"""Runs the demo: a server, two hosts, three twins each."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from esperml.demo.bus import BusRecorder
from esperml.demo.display import Watcher
from esperml.demo.report import render
from esperml.demo.server import ServerProcess
from esperml.demo.story import ROLES, TITLES, DemoStory, HostStory, Role, RunStory
from esperml.demo.summary import summarise
from esperml.trainer.arena.hosts import DEMO_HOSTS, HostSpec
from esperml.trainer.arena.twins import Plan, Progress, train_twin
from esperml.v1 import event_pb2

PLAN: Final = Plan().stretched(2)
"""The slowest pace at which experience is collected: with longer intervals telemetry costs less of the time."""

QUICK_PLAN: Final = Plan(
    steps=200, report_every=20, warmup_steps=40, decision_interval_steps=40, last_germination_step=140
)
_POLICIES: Final[dict[Role, str]] = {"static": "nothing", "adapted": "", "random": "chance"}
_SETTLE_TIMEOUT_S: Final = 20.0
_ANSWER_TIMEOUT_S: Final = 2.0
"""Longest wait for an answer: hosts of the demo take a step in less than a millisecond, and would be done before the
first decision came. One of everyday size is answered within a step or two."""


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo does.

    Attributes:
        out: folder for recordings, figures and report.
        seed: of the first repeat; the next ones count on.
        repeats: how often, each with its own seed.
        plan: how each twin is trained.
        hosts: by name.
        policy: checkpoint or name for the server. Empty: its own default.
    """

    out: Path
    seed: int = 0
    repeats: int = 1
    plan: Plan = PLAN
    hosts: Mapping[str, HostSpec] = field(default_factory=lambda: dict(DEMO_HOSTS))
    policy: str = ""


def run_demo(
    demo: Demo,
    watcher: Watcher,
    *,
    on_repeat: Callable[[], None] = lambda: None,
    on_server: Callable[[ServerProcess], None] = lambda _: None,
) -> DemoStory:
    """Run it, and write ``summary.json``, ``report.html`` and one recording a host and repeat into ``demo.out``.

    The server may die at any time: training finishes, and the outputs say what was lost.

    Args:
        demo: what to do.
        watcher: is told what happens.
        on_repeat: called before every repeat but the first.
        on_server: called once the server takes calls.

    Raises:
        ServerError: the server did not start.
    """
    began = time.monotonic()
    demo.out.mkdir(parents=True, exist_ok=True)
    for stale in demo.out.glob("*.mcap"):
        stale.unlink()
    story = DemoStory()
    arguments = ("--policy", demo.policy) if demo.policy else ()
    watcher.say("starting the server")
    with (
        tempfile.TemporaryDirectory(prefix="esper-demo-") as data,
        ServerProcess(Path(data), demo.out / "server.log", arguments) as server,
    ):
        on_server(server)
        watcher.say(f"the server listens on {server.address}")
        for repeat in range(demo.repeats):
            seed = demo.seed + repeat
            if repeat:
                on_repeat()
            story.seeds.append(seed)
            story.repeats.append([])
            for name, spec in demo.hosts.items():
                host = HostStory(name, replace(spec, seed=seed), runs={role: RunStory() for role in ROLES})
                story.repeats[-1].append(host)
                _train_host(demo, host, server, story, watcher)
    story.seconds = time.monotonic() - began
    (demo.out / "summary.json").write_text(json.dumps(summarise(story), indent=2) + "\n", encoding="utf-8")
    (demo.out / "report.html").write_text(render(story), encoding="utf-8")
    return story


def _train_host(demo: Demo, host: HostStory, server: ServerProcess, story: DemoStory, watcher: Watcher) -> None:
    run_ids: dict[Role, str] = {role: f"{host.name}-seed{host.spec.seed}-{role}" for role in ROLES}
    roles = {run_id: role for role, run_id in run_ids.items()}

    def on_event(event: event_pb2.Event) -> None:
        host.runs[roles[event.run_id]].take(event)
        watcher.event(host.name, roles[event.run_id], event)

    path = demo.out / f"{host.name}-seed{host.spec.seed}.mcap"
    with BusRecorder(server.address, path, tuple(roles), on_event) as recorder:
        for role in ROLES:
            watcher.say(f"{host.name}, seed {host.spec.seed}: {TITLES[role]}")
            _train_role(demo, host, role, run_ids, server, recorder, story, watcher)
        recorder.wait_until(
            lambda: host.runs["static"].ended and host.runs["adapted"].finished and host.runs["random"].finished,
            going=lambda: server.alive,
            timeout_s=_SETTLE_TIMEOUT_S,
        )


def _train_role(
    demo: Demo,
    host: HostStory,
    role: Role,
    run_ids: Mapping[Role, str],
    server: ServerProcess,
    recorder: BusRecorder,
    story: DemoStory,
    watcher: Watcher,
) -> None:
    def on_progress(moment: Progress) -> None:
        watcher.progress(host.name, role, moment)
        run = host.runs[role]
        if role != "static" and _is_due(demo.plan, run.decided_at, moment.step):
            recorder.wait_until(
                lambda: run.decided_at >= moment.step, going=lambda: server.alive, timeout_s=_ANSWER_TIMEOUT_S
            )
        if not story.server_lost and not server.alive:
            story.server_lost = f"by step {moment.step} of {host.name} {TITLES[role]}"
            watcher.say(f"the server was lost {story.server_lost}; training goes on without it")

    host.twins[role] = train_twin(
        host.spec,
        demo.plan,
        server.address,
        run=run_ids[role],
        mode="observe" if role == "static" else "act",
        policy=_POLICIES[role],
        paired_run="" if role == "static" else run_ids["static"],
        labels={"demo": host.name, "twin": role},
        on_progress=on_progress,
    )


def _is_due(plan: Plan, decided_at: int, step: int) -> bool:
    """Whether Tamiyo decides on the report of ``step``, having last decided on that of ``decided_at``, 0 for never."""
    return step >= max(plan.warmup_steps, decided_at + plan.decision_interval_steps if decided_at else 0)
