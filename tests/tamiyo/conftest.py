"""Hosts, reports and servers for the tests of Tamiyo."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from google.protobuf import json_format

from esperml.settings import TamiyoSettings
from esperml.tamiyo import checkpoint
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.policy import PolicyConfig, PolicyNetwork
from esperml.tamiyo.store import PolicyStore
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, health_pb2, run_pb2

BLUEPRINTS = ("low_rank", "mlp", "gate")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_graph(widths=(16, 32, 4, 32, 10), *, version=1, prefix="layer"):
    """A chain of linear layers, a place beside each and one across each neighbouring two."""
    graph = graph_pb2.HostGraph(structure_version=version, blueprints=BLUEPRINTS)
    for index, (read, made) in enumerate(pairwise(widths)):
        graph.layers.add(
            name=f"{prefix}{index}",
            type=graph_pb2.LAYER_TYPE_LINEAR,
            parameters=(read + 1) * made,
            input_shape=[read],
            output_shape=[made],
            activated=index + 2 < len(widths),
        )
        if index:
            graph.edges.sources.append(index - 1)
            graph.edges.targets.append(index)
            graph.edges.kinds.append(graph_pb2.EDGE_KIND_FORWARD)
    layers = len(graph.layers)
    pairs = [(i, i) for i in range(layers)] + [(i, i + 1) for i in range(layers - 1)]
    graph.places.sources.extend(source for source, _ in pairs)
    graph.places.targets.extend(target for _, target in pairs)
    graph.places.blueprints.extend([7] * layers + [3] * (layers - 1))
    return graph


def make_state(**changes):
    """A state in the middle of training, everything important measured."""
    state = graph_pb2.ModelGraphState(run_id="run", step=500, graph=make_graph(**changes))
    size = len(state.graph.layers)
    for name in ("dead_fraction", "gradient_norm", "expressivity_bottleneck", "effective_rank"):
        getattr(state.layers, name).values.extend([0.1 + 0.1 * index for index in range(size)])
    state.places.explained_error.values.extend([0.05] * len(state.graph.places.sources))
    state.run.train_loss = 0.7
    state.limits.CopyFrom(
        graph_pb2.RunLimits(
            parameter_budget=1000,
            graft_parameter_budget=400,
            max_live_seeds=2,
            warmup_steps=100,
            decision_interval_steps=100,
            blend_steps=20,
            hold_steps=100,
        )
    )
    return state


def make_report(graph, step, **run):
    """A report that measures every layer."""
    report = health_pb2.HealthReport(step=step, structure_version=graph.structure_version)
    for name, value in run.items():
        setattr(report.run, name, value)
    for index, layer in enumerate(graph.layers):
        report.layers.add(
            layer=layer.name, dead_fraction=0.1 * (index % 5), gradient_norm=0.5, expressivity_bottleneck=0.4
        )
    return report


class Host:
    """Speaks for a session: makes its events, and keeps what the controller answers."""

    def __init__(self, controller, run_id="run", *, session_id="", clock=1_000, **started):
        self.controller = controller
        self.run_id = run_id
        self.session_id = session_id
        self.clock = clock
        self.graph = started.pop("graph", None) or make_graph()
        self.started = {"mode": decision_pb2.MODE_ACT, "parameters": 1000, **started}
        self.count = 0
        self.said = []

    def event(self, **payload):
        self.count += 1
        event_id = f"{self.run_id}-{self.session_id}{self.count}"
        event = event_pb2.Event(event_id=event_id, run_id=self.run_id, session_id=self.session_id)
        event.created_at.FromSeconds(self.clock + self.count)
        [(name, message)] = payload.items()
        getattr(event, name).CopyFrom(message)
        getattr(event, name).SetInParent()
        return event

    def send(self, kind, event):
        self.said.append((kind, event))
        return self.controller.handle(kind, event)

    def start(self):
        return self.send(
            event_pb2.KIND_EVENTS, self.event(run_started=run_pb2.RunStarted(graph=self.graph, **self.started))
        )

    def report(self, step, seeds=(), **run):
        report = make_report(self.graph, step, **run)
        report.seeds.extend(seeds)
        return self.send(event_pb2.KIND_TELEMETRY, self.event(health_report=report))

    def answer(self, command, *, status=decision_pb2.COMMAND_STATUS_APPLIED, step=0, added=100):
        applied = decision_pb2.Applied(
            decision_id=command.decision_id,
            status=status,
            step=step or command.decided_at_step,
            seed_id=command.target.seed_id or f"seed-{command.decision_id[:6]}",
            parameters_added=added,
        )
        return self.send(event_pb2.KIND_OUTCOMES, self.event(applied=applied))

    def end(self, step, end=run_pb2.RUN_END_COMPLETED, **run):
        ended = run_pb2.RunEnded(step=step, end=end, run=health_pb2.RunMeasures(**run))
        return self.send(event_pb2.KIND_EVENTS, self.event(run_ended=ended))


def told(outgoing):
    """What was published, sorted by kind."""
    return SimpleNamespace(
        decisions=[event.decision for kind, event in outgoing if kind == event_pb2.KIND_DECISIONS],
        commands=[event.command for _, event in outgoing if event.HasField("command")],
        notices=[event.notice for _, event in outgoing if event.HasField("notice")],
        experience=[event.experience for kind, event in outgoing if kind == event_pb2.KIND_EXPERIENCE],
    )


def make_controller(tmp_path, policy="chance", **settings):
    settings = TamiyoSettings(
        **{"policy": policy, "policy_dir": tmp_path, "random_seed": 7, "warmup_steps": 100, **settings}
    )
    return Controller(PolicyStore.from_settings(settings), settings)


def make_seed(**values):
    """A seed that has held for long."""
    return health_pb2.SeedSignal(
        **{
            "seed_id": "s1",
            "place": 5,
            "stage": health_pb2.SEED_STAGE_HOLDING,
            "steps_in_stage": 500,
            "blueprint": "mlp",
            "parameters": 50,
            **values,
        }
    )


def until_command(host, steps=range(100, 5000, 100)):
    """Report until a command is sent; returns the step and what was told."""
    for step in steps:
        answers = told(host.report(step))
        if answers.commands:
            return step, answers
    raise AssertionError("no command was sent")


@pytest.fixture
def host(tmp_path):
    """A host whose run has started."""
    host = Host(make_controller(tmp_path))
    host.start()
    return host


@pytest.fixture
def network():
    return PolicyNetwork(PolicyConfig(BLUEPRINTS, hidden=16))


@pytest.fixture
def saved(tmp_path, network):
    path = tmp_path / "saved"
    checkpoint.save(path, network)
    return path


@pytest.fixture(scope="session")
def tools():
    """Everything above, for tests: conftest cannot be imported under import mode importlib."""
    return SimpleNamespace(
        graph=make_graph,
        state=make_state,
        report=make_report,
        seed=make_seed,
        Host=Host,
        told=told,
        until_command=until_command,
        controller=make_controller,
    )


@pytest.fixture
def parsed_example(request):
    from esperml.v1 import tamiyo_pb2

    path = request.config.rootpath / "examples" / "decide.json"
    return json_format.Parse(path.read_text(), tamiyo_pb2.DecideRequest())
