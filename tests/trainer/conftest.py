"""Experience over small random hosts in which a known rule decides what pays.

A host is a chain of layers. A sick one is narrow somewhere: a span-two "mlp" into the layer after the narrow one is
worth 0.4, spread over the decisions that follow; a span-one "mlp" there a little; anything else costs its price. A
healthy host gains nothing from anything. Behaviour is random and says with which probability.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from esperml.client.recording import Recorder
from esperml.v1 import decision_pb2, event_pb2, experience_pb2, graph_pb2, health_pb2, run_pb2

BLUEPRINTS = ("gate", "mlp")
INTERVAL = 100
DECISIONS = 3
PRICE = 0.04


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Host:
    """A chain of layers; ``narrow`` is the index of the layer with few outputs, or None for a healthy host."""

    widths: tuple[int, ...]
    narrow: int | None

    @property
    def layers(self) -> int:
        return len(self.widths) - 1

    def graph(self) -> graph_pb2.HostGraph:
        graph = graph_pb2.HostGraph(structure_version=1, blueprints=BLUEPRINTS)
        for index, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            graph.layers.add(
                name=f"layers.{index}",
                type=graph_pb2.LAYER_TYPE_LINEAR,
                parameters=inputs * outputs + outputs,
                input_shape=[inputs],
                output_shape=[outputs],
                activated=index < self.layers - 1,
            )
        for index in range(self.layers - 1):
            graph.edges.sources.append(index)
            graph.edges.targets.append(index + 1)
            graph.edges.kinds.append(graph_pb2.EDGE_KIND_FORWARD)
        for source, target in self.places():
            graph.places.sources.append(source)
            graph.places.targets.append(target)
            graph.places.blueprints.append(2 ** len(BLUEPRINTS) - 1)
        return graph

    def places(self) -> list[tuple[int, int]]:
        return [(i, i) for i in range(self.layers)] + [(i, i + 1) for i in range(self.layers - 1)]

    @property
    def best(self) -> tuple[int, str] | None:
        """The place and the blueprint that pay, or None."""
        return None if self.narrow is None else (self.places().index((self.narrow, self.narrow + 1)), "mlp")

    def worth(self, place: int, blueprint: str) -> float:
        """What a graft gains in all, its price not counted."""
        if self.narrow is None:
            return 0.0
        if (place, blueprint) == self.best:
            return 0.4
        return 0.1 if self.places()[place] == (self.narrow, self.narrow) and blueprint == "mlp" else 0.0


def make_host(random: np.random.Generator, *, healthy: float = 0.3) -> Host:
    """A random host; healthy with the given probability."""
    layers = int(random.integers(3, 5))
    widths = [int(random.integers(24, 65)) for _ in range(layers + 1)]
    if random.random() < healthy:
        return Host(tuple(widths), None)
    narrow = int(random.integers(0, layers - 1))
    widths[narrow + 1] = int(random.integers(3, 7))
    return Host(tuple(widths), narrow)


def make_state(
    host: Host, run: str, step: int, random: np.random.Generator, *, grown: bool = False
) -> graph_pb2.ModelGraphState:
    """A state with noisy but telling measures; nothing may be grown where something was."""
    graph = host.graph()
    state = graph_pb2.ModelGraphState(run_id=run, step=step, graph=graph)
    noise = random.normal(0, 0.02, size=(4, host.layers))
    sick = np.array([0.6 if index == host.narrow and not grown else 0.2 for index in range(host.layers)])
    columns = {
        "health": 1 - sick,
        "expressivity_bottleneck": sick,
        "dead_fraction": np.full(host.layers, 0.2),
        "effective_rank": np.full(host.layers, 0.6),
    }
    for row, (name, values) in enumerate(columns.items()):
        getattr(state.layers, name).values.extend(np.clip(values + noise[row], 0, 1).tolist())
    state.run.train_loss = 1.0 / (1 + step / 100)
    state.run.held_out_loss = 1.1 / (1 + step / 100)
    state.run.parameters = sum(layer.parameters for layer in graph.layers)
    if grown:
        state.seeds.add(seed_id="seed", blueprint="mlp", alpha=1.0, stage=health_pb2.SEED_STAGE_HOLDING)
    state.mask.may_adapt = not grown
    if not grown:
        state.mask.blueprints.extend(graph.places.blueprints)
    return state


def make_episode(
    host: Host, run: str, random: np.random.Generator, *, adapt: float = 0.7
) -> list[experience_pb2.TrainingExperience]:
    """An episode in which chance decides: adapt with the given probability, then any place and blueprint alike."""
    result: list[experience_pb2.TrainingExperience] = []
    places, planted = host.places(), None
    for index in range(DECISIONS):
        step = (index + 1) * INTERVAL
        state = result[-1].next_state if result else make_state(host, run, step, random)
        decision = decision_pb2.AdaptationDecision(
            decision_id=f"{run}-{index}", run_id=run, step=step, structure_version=1, policy="chance", feature_version=1
        )
        cost = 0.0
        if planted is None and random.random() < adapt:
            planted = (int(random.integers(len(places))), str(random.choice(BLUEPRINTS)), DECISIONS - index)
            place, blueprint, _ = planted
            cost = PRICE
            decision.action.germinate.blueprint = blueprint
            decision.target.source_layer = f"layers.{places[place][0]}"
            decision.target.target_layer = f"layers.{places[place][1]}"
            decision.disposition = decision_pb2.DISPOSITION_SENT
            parts = [adapt, 1 / len(places), 1 / len(BLUEPRINTS)]
            decision.propensity.place_log_probability = math.log(parts[1])
            decision.propensity.blueprint_log_probability = math.log(parts[2])
        else:
            decision.action.none.SetInParent()
            decision.disposition = decision_pb2.DISPOSITION_NONE
            parts = [1 - adapt if planted is None else 1.0]
        decision.propensity.adapt_log_probability = math.log(parts[0])
        decision.propensity.joint_log_probability = sum(map(math.log, parts))
        gain = host.worth(planted[0], planted[1]) / planted[2] if planted else 0.0
        total = float(np.clip(gain - cost + random.normal(0, 0.01), -1, 1))
        item = experience_pb2.TrainingExperience(
            schema_version=1,
            episode_id=run,
            index=index,
            state=state,
            decision=decision,
            next_state=make_state(host, run, step + INTERVAL, random, grown=planted is not None),
            elapsed_steps=INTERVAL,
            done=index == DECISIONS - 1,
        )
        item.reward.total = total
        item.reward.basis = decision_pb2.BASIS_PAIRED_BRANCH
        item.reward.terms.add(name="gain", value=total + cost)
        item.reward.terms.add(name="parameters", value=-cost)
        result.append(item)
    return result


@dataclass
class World:
    """Hosts, the episodes that were run on them and how those were started."""

    hosts: dict[str, Host] = field(default_factory=dict)
    episodes: list[list[experience_pb2.TrainingExperience]] = field(default_factory=list)
    runs: dict[str, run_pb2.RunStarted] = field(default_factory=dict)

    @property
    def experiences(self) -> list[experience_pb2.TrainingExperience]:
        return [item for episode in self.episodes for item in episode]


def make_world(hosts: int, episodes: int, seed: int) -> World:
    """So many hosts with so many episodes each; the episodes of a host share its twin."""
    random = np.random.default_rng(seed)
    world = World()
    for number in range(hosts):
        host, twin = make_host(random), f"twin-{seed}-{number}"
        world.hosts[twin] = host
        for repeat in range(episodes):
            run = f"run-{seed}-{number}-{repeat}"
            world.runs[run] = run_pb2.RunStarted(
                graph=host.graph(), paired_run=twin, labels={"family": f"f{number % 2}"}
            )
            world.episodes.append(make_episode(host, run, random))
    return world


def write_recording(
    path: Path, experiences: Sequence[experience_pb2.TrainingExperience], runs: dict[str, run_pb2.RunStarted]
) -> Path:
    """A recording of run starts and experience."""
    with Recorder(path) as recorder:
        for name, run in runs.items():
            recorder.write(event_pb2.KIND_EVENTS, _event(f"start-{name}", name, run_started=run))
        for number, item in enumerate(experiences):
            event = _event(f"experience-{number}", item.state.run_id, experience=item)
            recorder.write(event_pb2.KIND_EXPERIENCE, event)
    return path


def _event(event_id: str, run_id: str, **payload: object) -> event_pb2.Event:
    event = event_pb2.Event(event_id=event_id, run_id=run_id, **payload)  # type: ignore[arg-type]
    event.created_at.FromSeconds(1_700_000_000)
    return event


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """This module: the generator of hosts, states, episodes and recordings."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def world() -> World:
    """Sixty hosts, eight episodes each: 1,440 experiences."""
    return make_world(60, 8, seed=1)


@pytest.fixture
def small_world() -> World:
    return make_world(4, 3, seed=7)


@pytest.fixture
def record(tmp_path: Path) -> Callable[[World], Path]:
    """Writes a world into a recording of its own."""
    count = iter(range(100))

    def write(world: World) -> Path:
        return write_recording(tmp_path / f"recording-{next(count)}.mcap", world.experiences, world.runs)

    return write
