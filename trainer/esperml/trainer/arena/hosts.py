"""Hosts: small networks with narrow places, silent units or nothing amiss, described so that they can be rebuilt."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from esperml.trainer.arena.tasks import Task, load_task

Shape = Literal["chain", "residual", "branch", "convolution"]

SHAPES: Final[tuple[Shape, ...]] = ("chain", "residual", "branch", "convolution")
_SILENT_BIAS: Final = -20.0


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One host, fully described.

    Attributes:
        task: name of its task.
        widths: widths of the hidden layers, first to last. What they mean depends on ``shape``:
            ``chain``: linear layers one after the other;
            ``residual``: the width of the trunk, then the inner width of each residual block;
            ``branch``: the stem, the two parallel branches, then the layers after they are joined (at least three);
            ``convolution``: channels of the convolutions.
        shape: how the layers are joined.
        silent: indices of hidden layers of a chain in which all units but ``silent_units`` never respond: a narrow
            place that no width shows.
        silent_units: units of a silent layer that do respond.
        learning_rate: of AdamW.
        batch_size: samples per step.
        seed: of the weights and of the order of the data.
    """

    task: str
    widths: tuple[int, ...]
    shape: Shape = "chain"
    silent: tuple[int, ...] = ()
    silent_units: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape: {self.shape!r} is none of {', '.join(SHAPES)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths: {self.widths} must name at least one layer, each at least 1 wide")
        if self.shape == "branch" and len(self.widths) < 3:
            raise ValueError(f"widths: a branch needs a stem and two branches, got {self.widths}")
        if self.silent and (self.shape != "chain" or not 0 <= min(self.silent) <= max(self.silent) < len(self.widths)):
            raise ValueError(f"silent: {self.silent} must index hidden layers of a chain")

    @property
    def name(self) -> str:
        """Short and unique among specs that differ in more than learning rate and batch size."""
        widths = "-".join(map(str, self.widths))
        silent = "".join(f"-silent{index}x{self.silent_units}" for index in self.silent)
        return f"{self.task}-{self.shape}-{widths}{silent}-s{self.seed}"

    def labels(self) -> dict[str, str]:
        """The spec as labels of a run, by which recordings can be told apart."""
        return {key: str(value) for key, value in asdict(self).items()}


class Residual(nn.Module):
    """x + narrow(x): a block of two linear layers beside an identity."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs and outputs: [batch, width]."""
        result: Tensor = torch.relu(inputs + self.outer(torch.relu(self.inner(inputs))))
        return result


class Branched(nn.Module):
    """A stem, two parallel layers that both read it, and what follows their concatenation."""

    def __init__(self, features: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(features, widths[0])
        self.left = nn.Linear(widths[0], widths[1])
        self.right = nn.Linear(widths[0], widths[2])
        self.tail = _chain([widths[1] + widths[2], *widths[3:]], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs: [batch, features]. Outputs: [batch, classes]."""
        stem = torch.relu(self.stem(inputs))
        joined = torch.cat([torch.relu(self.left(stem)), torch.relu(self.right(stem))], dim=1)
        result: Tensor = self.tail(joined)
        return result


class Grid(nn.Module):
    """Gives flat features the shape that convolutions read: [batch, features] to [batch, 1, *shape]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs: [batch, features]. Outputs: [batch, 1, *shape]."""
        return inputs.reshape(inputs.shape[0], 1, *self.shape)


def build(spec: HostSpec, task: Task | None = None) -> nn.Module:
    """The host of ``spec``, with weights drawn from its seed.

    The global generator of torch is left as it was.

    Raises:
        ValueError: the shape does not suit the task.
    """
    task = task or load_task(spec.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        match spec.shape:
            case "chain":
                return _chain([task.features, *spec.widths], task.classes, spec.silent, spec.silent_units)
            case "residual":
                return _residual(spec, task)
            case "branch":
                return Branched(task.features, spec.widths, task.classes)
            case "convolution":
                return _convolution(spec, task)


def _chain(widths: Sequence[int], classes: int, silent: Sequence[int] = (), silent_units: int = 0) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        layer = nn.Linear(inputs, outputs)
        if index in silent:
            with torch.no_grad():
                layer.bias[silent_units:] = _SILENT_BIAS
        layers[f"hidden{index + 1}"] = layer
        layers[f"relu{index + 1}"] = nn.ReLU()
    layers["output"] = nn.Linear(widths[-1], classes)
    return nn.Sequential(layers)


def _residual(spec: HostSpec, task: Task) -> nn.Sequential:
    trunk, *inner = spec.widths
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Linear(task.features, trunk), relu=nn.ReLU())
    for index, width in enumerate(inner):
        layers[f"block{index + 1}"] = Residual(trunk, width)
    layers["output"] = nn.Linear(trunk, task.classes)
    return nn.Sequential(layers)


def _convolution(spec: HostSpec, task: Task) -> nn.Sequential:
    match task.layout:
        case "image":
            side = round(task.features**0.5)
            shape: tuple[int, ...] = (side, side)
        case "sequence":
            shape = (task.features,)
        case "table":
            raise ValueError(f"shape: convolution does not suit the table {task.name}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(grid=Grid(shape))
    channels = 1
    for index, width in enumerate(spec.widths):
        # The first two halve the grid, so that the output layer stays small.
        stride = 2 if index < 2 else 1
        layers[f"conv{index + 1}"] = (
            nn.Conv2d(channels, width, 3, stride, padding=1)
            if len(shape) == 2
            else nn.Conv1d(channels, width, 5, stride, padding=2)
        )
        layers[f"relu{index + 1}"] = nn.ReLU()
        shape, channels = tuple(-(-extent // stride) for extent in shape), width
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(channels * math.prod(shape), task.classes)
    return nn.Sequential(layers)


DEMO_HOSTS: Final[dict[str, HostSpec]] = {
    "digits": HostSpec("digits", (32, 32, 3), learning_rate=5e-4),
    "mnist1d": HostSpec("mnist1d", (64, 6, 64), learning_rate=1e-3),
}
"""The two hosts of the demo. :func:`sample_hosts` never draws them, so that they are unseen by what is learned."""


@dataclass(frozen=True, slots=True)
class Family:
    """What hosts are drawn from.

    Attributes:
        tasks: names of tasks with their weights.
        shapes: shapes with their weights.
        healthy_share: share of hosts in which nothing is amiss.
        silent_share: share of the ailing chains whose fault shows in no width.
        wide: widths of layers that are wide enough.
        narrow: widths of layers that are not.
    """

    tasks: dict[str, float] = field(
        default_factory=lambda: {"digits": 0.3, "mnist1d": 0.35} | {f"tabular-{n}": 0.35 / 12 for n in range(12)}
    )
    shapes: dict[Shape, float] = field(
        default_factory=lambda: {"chain": 0.6, "residual": 0.12, "branch": 0.16, "convolution": 0.12}
    )
    healthy_share: float = 0.25
    silent_share: float = 0.2
    wide: tuple[int, ...] = (16, 24, 32, 48, 64)
    narrow: tuple[int, ...] = (2, 3, 4, 5, 6, 8)


def sample_hosts(count: int, seed: int, family: Family | None = None) -> list[HostSpec]:
    """``count`` different hosts, the demo's excluded. A longer list with the same seed begins with the shorter one."""
    if count < 1:
        raise ValueError(f"count: {count} must be at least 1")
    unseen = {(spec.task, spec.widths) for spec in DEMO_HOSTS.values()}
    hosts: dict[tuple[Any, ...], HostSpec] = {}
    for spec in _draws(family or Family(), random.Random(seed)):
        if (spec.task, spec.widths) not in unseen:
            hosts.setdefault((spec.task, spec.shape, spec.widths, spec.silent), spec)
        if len(hosts) == count:
            break
    return list(hosts.values())


def _draws(family: Family, draw: random.Random) -> Iterator[HostSpec]:
    while True:
        task = draw.choices([*family.tasks], [*family.tasks.values()])[0]
        shape = draw.choices([*family.shapes], [*family.shapes.values()])[0]
        if shape == "convolution" and task.startswith("tabular"):
            shape = "chain"
        healthy = draw.random() < family.healthy_share
        silent = shape == "chain" and not healthy and draw.random() < family.silent_share
        hidden = {"chain": draw.randint(1, 4), "residual": draw.randint(2, 3), "branch": draw.randint(3, 4)}
        count = hidden.get(shape, draw.randint(2, 3))
        widths = [draw.choice(family.wide) for _ in range(count)]
        if shape == "convolution":
            widths = [draw.choice((8, 12, 16)) for _ in range(count)]
        place = draw.randrange(count)
        if not healthy and not silent:
            widths[place] = draw.choice((1, 2)) if shape == "convolution" else draw.choice(family.narrow)
            if count > 2 and draw.random() < 0.2:
                widths[draw.randrange(count)] = widths[place]
        yield HostSpec(
            task=task,
            widths=tuple(widths),
            shape=shape,
            silent=(place,) if silent else (),
            silent_units=draw.choice((2, 3, 4, 6)),
            learning_rate=draw.choice((5e-4, 1e-3, 2e-3)),
            batch_size=draw.choice((64, 128)),
            seed=draw.randrange(2**31),
        )
