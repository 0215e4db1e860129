"""All that the training of a host depends on, taken down as plain values and put back: roll-backs and resume use it.

The state of a run is a dictionary that ``torch.load(weights_only=True)`` reads. Tensors of the host and its seeds lie
under the names that ``named_parameters`` and ``named_buffers`` give them; the optimizer's and the scheduler's are their
own ``state_dict`` with, beside it, the names of the parameters in each group. A seed that is not there any more, or not
there yet, is built again from its blueprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esperml.kasmina import stages
from esperml.kasmina.errors import CheckpointError, RefusedError
from esperml.kasmina.generators import capture_generators, restore_generators
from esperml.kasmina.grafting import Grafter
from esperml.kasmina.host import Host
from esperml.kasmina.plain import plain
from esperml.kasmina.seeds import Seed

FORMAT: Final = 1
"""Version of the layout, which a state carries."""

_NOT_FACTS: Final = frozenset({"seed_id", "place", "blueprint", "body"})
_PARTS: Final = ("model", "seeds", "optimizer", "scheduler", "generators", "structure_version")


@dataclass(frozen=True, slots=True)
class _Planned:
    """A seed as it shall be, checked before anything is changed."""

    seed: Seed
    facts: Mapping[str, Any]


class TrainingState:
    """Takes down and puts back the state of one host and of what trains it.

    Args:
        grafter: the host and its optimizer's surgery.
        optimizer: the optimizer.
        scheduler: its scheduler, if any.
    """

    def __init__(self, grafter: Grafter, optimizer: Optimizer, scheduler: object | None) -> None:
        self._grafter = grafter
        self._host = grafter.host
        self._optimizer = optimizer
        self._scheduler = scheduler

    def capture(self) -> dict[str, Any]:
        """The state now: a copy on the processor. Call it between optimizer steps.

        Raises:
            CheckpointError: the optimizer or the scheduler keeps what is no plain value, or has no ``state_dict``.
        """
        tensors = self._tensors()
        names = {id(tensor): name for name, tensor in tensors.items()}
        return {
            "format": FORMAT,
            "structure_version": self._host.structure_version,
            "model": plain(tensors, "model"),
            "seeds": [_describe(self._host, seed) for seed in self._host.seeds.values()],
            "optimizer": {
                "class": type(self._optimizer).__name__,
                "names": [[names[id(p)] for p in group["params"]] for group in self._optimizer.param_groups],
                "state": plain(self._optimizer.state_dict(), "optimizer"),
            },
            "scheduler": None
            if self._scheduler is None
            else {"class": type(self._scheduler).__name__, "state": plain(_saves(self._scheduler), "scheduler")},
            "generators": capture_generators(),
        }

    def restore(self, state: Mapping[str, Any], *, torch_only: bool = False) -> bool:
        """Put ``state`` back: host, seeds with their stages, optimizer, scheduler and generators.

        The host's parameters stay the objects that they are. Gradients are let go.

        Args:
            state: what :meth:`capture` gave, here or in an earlier process.
            torch_only: leave the generators of Python and NumPy as they are.

        Returns:
            Whether the host's structure is another one now. Its version is then one that it never had.

        Raises:
            CheckpointError: it does not fit; the message names what. Nothing was changed.
        """
        self._check(state)
        planned = self._plan(state["seeds"])
        self._check_tensors(state["model"], planned)
        self._check_groups(state, planned)
        changed = self._rebuild(planned, state)
        with torch.no_grad():
            self._fill(state["model"])
        self._arrange(state["optimizer"]["names"])
        # Both take tensors over as they are, and change them later: the state must outlive that.
        self._optimizer.load_state_dict(plain(state["optimizer"]["state"], "optimizer"))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(plain(state["scheduler"]["state"], "scheduler"))  # type: ignore[attr-defined]
        restore_generators(state["generators"], torch_only=torch_only)
        for parameter in self._host.model.parameters():
            parameter.grad = None
        return changed

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; what the optimizer trains beyond the model is numbered."""
        model = self._host.model
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        known = {id(tensor) for tensor in tensors.values()}
        beyond = [p for g in self._optimizer.param_groups for p in g["params"] if id(p) not in known]
        return tensors | {f"optimizer:{at}": parameter for at, parameter in enumerate(beyond)}

    def _check(self, state: Mapping[str, Any]) -> None:
        """What holds whatever the structure is."""
        if state.get("format") != FORMAT:
            raise CheckpointError(f"format is {state.get('format')!r}; this version reads {FORMAT}")
        for part in _PARTS:
            if part not in state:
                raise CheckpointError(f"{part} is missing")
        _same("optimizer", state["optimizer"]["class"], type(self._optimizer).__name__)
        there = None if self._scheduler is None else type(self._scheduler).__name__
        _same("scheduler", None if state["scheduler"] is None else state["scheduler"]["class"], there)

    def _plan(self, described: list[Mapping[str, Any]]) -> list[_Planned]:
        return [_Planned(self._seed(entry), entry["facts"]) for entry in described]

    def _seed(self, entry: Mapping[str, Any]) -> Seed:
        """The seed that ``entry`` describes: the one that is there, or a new one of the same shape."""
        name, shapes = entry["seed_id"], entry["shapes"]
        present = self._host.seeds.get(name)
        if present is not None and present.blueprint == entry["blueprint"] and _shapes(present.body) == shapes:
            return present
        try:
            place = self._host.place_index(entry["source"], entry["target"])
        except RefusedError as error:
            raise CheckpointError(f"seed {name!r}: {error.reason}") from error
        blueprint = next((known for known in self._host.blueprints if known.name == entry["blueprint"]), None)
        if blueprint is None:
            names = ", ".join(known.name for known in self._host.blueprints)
            raise CheckpointError(
                f"seed {name!r} is of blueprint {entry['blueprint']!r}, which is none here; register it before the "
                f"model is wrapped. There are {names}"
            )
        where = self._host.places[place]
        target = self._host.layers[where.target].module
        try:
            body = blueprint.build(where.geometry, entry["parameters"])
        except RefusedError as error:
            raise CheckpointError(f"seed {name!r}: {error.reason}") from error
        if _shapes(body) != shapes:
            raise CheckpointError(f"seed {name!r}: blueprint {blueprint.name!r} makes {_shapes(body)}, not {shapes}")
        weight = next(target.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        body.to(device=weight.device, dtype=dtype).train(target.training)
        return Seed(name, place, blueprint.name, body, blend_steps=0)

    def _check_tensors(self, saved: Mapping[str, Tensor], planned: list[_Planned]) -> None:
        """The host's own tensors must be there by name, parameters by shape too; those of seeds were checked."""
        bodies = {id(t) for seed in self._host.seeds.values() for t in (*seed.body.parameters(), *seed.body.buffers())}
        own = {name: tensor for name, tensor in self._tensors().items() if id(tensor) not in bodies}
        grown = sum(len(_shapes(plan.seed.body)) for plan in planned)
        missing = next((name for name in own if name not in saved), None)
        if missing is not None:
            raise CheckpointError(f"model: {missing!r} is here, and not in the state")
        if len(saved) != len(own) + grown:
            extra = next((n for n in saved if n not in own and ".kasmina_seeds." not in f".{n}"), "parts of a seed")
            raise CheckpointError(f"model: {extra!r} is in the state, and not here")
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter) and tensor.shape != saved[name].shape:
                raise CheckpointError(
                    f"model: {name!r} is {tuple(tensor.shape)} here, {tuple(saved[name].shape)} there"
                )

    def _check_groups(self, state: Mapping[str, Any], planned: list[_Planned]) -> None:
        """There must be as many groups as can be had: those of the host, and at most one for each seed."""
        names, groups = state["optimizer"]["names"], state["optimizer"]["state"]["param_groups"]
        unknown = next((name for group in names for name in group if name not in state["model"]), None)
        if unknown is not None or [len(group) for group in names] != [len(group["params"]) for group in groups]:
            raise CheckpointError(f"optimizer: its groups do not go with the model: {unknown or 'their sizes differ'}")
        seeds = {id(p) for seed in self._host.seeds.values() for p in seed.body.parameters()}
        own = sum(
            not group["params"] or any(id(p) not in seeds for p in group["params"])
            for group in self._optimizer.param_groups
        )
        there = len(state["optimizer"]["names"])
        if not own <= there <= own + len(planned):
            raise CheckpointError(
                f"optimizer: the host's parameters are in {own} groups here; the state has {there}, seeds included"
            )

    def _rebuild(self, planned: list[_Planned], state: Mapping[str, Any]) -> bool:
        """Make the seeds those that are planned, in their order, on the host and in the optimizer."""
        host, surgery = self._host, self._grafter.surgery
        before = _structure(host)
        stay = {plan.seed.seed_id for plan in planned}
        for name, seed in host.seeds.items():
            surgery.leave(seed.body)
            seed.detach(host.layers[host.places[seed.place].target].module)
            if name not in stay:
                seed.enter(stages.ROLLED_BACK)
                host.resting.begin(seed.place, seed.stage)
        host.seeds.clear()
        for plan in planned:
            for name, value in plan.facts.items():
                setattr(plan.seed, name, value)
            host.attach(plan.seed)
        for seed in _in_order_of(state["optimizer"]["names"], host):
            surgery.join(seed.seed_id, seed.body, host.layers[host.places[seed.place].target].module)
        self._grafter.warmup.refresh()
        changed = before != _structure(host)
        if changed:
            host.structure_version = max(host.structure_version + 1, state["structure_version"])
        return changed

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            if tensor.shape == saved[name].shape:
                tensor.copy_(saved[name])
            else:  # A buffer that has grown or shrunk since.
                module, _, own = name.rpartition(".")
                self._host.model.get_submodule(module)._buffers[own] = saved[name].to(tensor.device, copy=True)

    def _arrange(self, groups: list[list[str]]) -> None:
        """Parameters go to the groups that they were in, wherever the user had put them."""
        tensors = self._tensors()
        self._grafter.surgery.arrange([[tensors[name] for name in group] for group in groups])


def _describe(host: Host, seed: Seed) -> dict[str, Any]:
    place = host.places[seed.place]
    facts = {name: value for name, value in vars(seed).items() if name[0] != "_" and name not in _NOT_FACTS}
    return {
        "seed_id": seed.seed_id,
        "blueprint": seed.blueprint,
        "source": host.layers[place.source].name,
        "target": host.layers[place.target].name,
        "parameters": seed.parameter_count,
        "shapes": _shapes(seed.body),
        "facts": plain(facts, f"seed {seed.seed_id!r}"),
    }


def _shapes(body: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in (*body.named_parameters(), *body.named_buffers())}


def _in_order_of(groups: list[list[str]], host: Host) -> list[Seed]:
    """The seeds whose parameters are trained, in the order of the groups that they are in."""
    at = {name: index for index, group in enumerate(groups) for name in group}
    names = {id(parameter): name for name, parameter in host.model.named_parameters()}
    first = {
        seed.seed_id: min((at[names[id(p)]] for p in seed.body.parameters() if names[id(p)] in at), default=None)
        for seed in host.seeds.values()
    }
    trained = [seed for seed in host.seeds.values() if first[seed.seed_id] is not None]
    return sorted(trained, key=lambda seed: first[seed.seed_id] or 0)


def _structure(host: Host) -> list[tuple[str, bool]]:
    return [(seed.seed_id, seed.live) for seed in host.seeds.values()]


def _saves(scheduler: object) -> Any:
    try:
        return scheduler.state_dict()  # type: ignore[attr-defined]
    except AttributeError as error:
        raise CheckpointError(f"scheduler: {type(scheduler).__name__} has no state_dict: {error}") from error


def _same(part: str, saved: object, here: object) -> None:
    if saved != here:
        raise CheckpointError(f"{part}: the state is of {saved or 'none'}, and here it is {here or 'none'}")
