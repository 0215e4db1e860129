"""Small hosts of many shapes, and a training loop."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from esperml import kasmina
from esperml.kasmina import topology
from esperml.v1 import decision_pb2, event_pb2, run_pb2


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


class ConvNet(nn.Module):
    """Convolutions with strides and batch normalisation, then a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class ResidualNet(nn.Module):
    """A block that is added to what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 8)
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.head(x + self.outer(functional.relu(self.inner(x))))


class BranchingNet(nn.Module):
    """Two branches read the same, and are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 8)
        self.left = nn.Linear(8, 4)
        self.right = nn.Linear(8, 5)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.cat((torch.relu(self.left(x)), functional.gelu(self.right(x))), 1))


class TwoInputs(nn.Module):
    """Two inputs that meet in a sum; keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 8)
        self.other = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(x) + self.other(input=z)))


class SharedLayer(nn.Module):
    """One layer that runs twice, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))


class SignalNet(nn.Module):
    """One-dimensional convolutions with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 5, padding="same", padding_mode="circular")
        self.second = nn.Conv1d(4, 6, 3, stride=2, dilation=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.second(torch.relu(self.first(x))))).flatten(1))


class TokenMlp(nn.Module):
    """The feed-forward block of a transformer on (batch, tokens, features), with normalisation and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(x).mean(1)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (lambda: mlp(10, 8, 4, 8, 3), ((16, 10),)),
    "conv": (ConvNet, ((16, 1, 8, 8),)),
    "residual": (ResidualNet, ((16, 10),)),
    "branching": (BranchingNet, ((16, 10),)),
    "two_inputs": (TwoInputs, ((16, 10), (16, 6))),
    "shared": (SharedLayer, ((16, 10),)),
    "signal": (SignalNet, ((16, 1, 20),)),
    "tokens": (TokenMlp, ((16, 5, 10),)),
    "volume": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        ((16, 1, 4, 4, 4),),
    ),
}


@dataclass
class Case:
    """A host, its optimizer and a batch."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    labels: Tensor
    optimizer: torch.optim.Optimizer

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.model(*self.inputs), self.labels)

    def step(self, session: kasmina.Session | None = None, **told: Any) -> float:
        """One optimizer step, as a user writes it."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        if session is not None:
            session.step(loss=loss, **told)
        self.optimizer.zero_grad()
        return loss.item()

    def logits(self) -> Tensor:
        """What the host gives in evaluation mode."""
        with topology.undisturbed(self.model), torch.no_grad():
            self.model.eval()
            return self.model(*self.inputs)

    def evaluate(self, model: nn.Module) -> float:
        return functional.cross_entropy(model(*self.inputs), self.labels).item()


def make_case(name: str, *, wrapped: bool = True) -> Case:
    make, shapes = HOSTS[name]
    torch.manual_seed(1)
    model = make()
    inputs = tuple(torch.randn(shape) for shape in shapes)
    if wrapped:
        kasmina.wrap(model, inputs)
    labels = torch.randint(0, 3, (inputs[0].shape[0],))
    return Case(model, inputs, labels, torch.optim.AdamW(model.parameters(), 1e-2))


@pytest.fixture
def case():
    """Makes a host by name, with what is needed to train it."""
    return make_case


@pytest.fixture(params=list(HOSTS))
def any_case(request) -> Case:
    """Each host in turn."""
    return make_case(request.param)


@pytest.fixture(params=list(HOSTS))
def any_host(request) -> str:
    """The name of each host in turn."""
    return request.param


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Bench:
    """A controller played by the test: keeps what is published, and sends the commands that it is given."""

    def __init__(self) -> None:
        self.events: list[tuple[int, event_pb2.Event]] = []
        self.waiting: list[decision_pb2.Command] = []
        self.notices: list[run_pb2.Notice] = []
        self.other: list[event_pb2.Event] = []
        self.link = kasmina.LocalLink(self._handle)

    def _handle(self, kind, event):
        self.events.append((kind, event))
        answers = [event_pb2.Event(run_id=event.run_id, command=command) for command in self.waiting]
        answers += [event_pb2.Event(run_id=event.run_id, notice=notice) for notice in self.notices]
        answers += self.other
        self.waiting, self.notices, self.other = [], [], []
        return [(event_pb2.KIND_COMMANDS, answer) for answer in answers]

    def payloads(self, name: str) -> list[Any]:
        return [getattr(event, name) for _, event in self.events if event.WhichOneof("payload") == name]

    @property
    def reports(self):
        return self.payloads("health_report")

    @property
    def applied(self):
        return self.payloads("applied")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def germinate(
    source: str, target: str, *, decision_id="d-1", blueprint="mlp", budget=500, blend_steps=0, expires=0
) -> decision_pb2.Command:
    return decision_pb2.Command(
        decision_id=decision_id,
        target=decision_pb2.Target(source_layer=source, target_layer=target),
        action=decision_pb2.Action(
            germinate=decision_pb2.Germinate(blueprint=blueprint, parameter_budget=budget, blend_steps=blend_steps)
        ),
        expires_after_step=expires,
    )


@pytest.fixture
def germination():
    """Makes a command that germinates."""
    return germinate


@pytest.fixture
def on_seed():
    """Makes a command about a seed: ``on_seed(seed_id, decision_id, fossilise=…)``."""

    def make(seed_id: str, decision_id: str, **action: Any) -> decision_pb2.Command:
        return decision_pb2.Command(
            decision_id=decision_id,
            target=decision_pb2.Target(seed_id=seed_id),
            action=decision_pb2.Action(**action),
        )

    return make
