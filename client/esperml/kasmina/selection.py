"""Which layers of a model are wrapped, in the conventions of Hugging Face's PEFT.

A list names layers by the ends of their names: ``["query", "mlp.fc1"]`` selects ``encoder.0.query`` too. A single
string is a regular expression that must match a whole name: ``"encoder\\..*"``; ``"all-linear"`` stands for all Linear
layers but the model's output layer. A type selects its instances; lists may have types among the names. Anything else
that can be called is asked for each layer, with its name and the module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, TypeAlias

from torch import nn

from esperml.kasmina.errors import UnsupportedHostError
from esperml.kasmina.geometry import LINEAR
from esperml.kasmina.kinds import GROWING, LayerKind, layer_kind
from esperml.kasmina.seeds import CONTAINER
from esperml.v1 import graph_pb2

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
_Given: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | Predicate
Selection: TypeAlias = _Given | None
"""Names by their ends, a regular expression, types, or a predicate of name and module."""

ALL_LINEAR: Final = "all-linear"
ALL: Final = "all"

_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict)
_NEAR_MISSES: Final = 3


@dataclass(frozen=True, slots=True)
class Selected:
    """One layer that is to be wrapped.

    Attributes:
        module: the layer.
        kind: what it computes.
        may_grow: whether it was selected for seeds rather than only to be observed.
    """

    module: nn.Module
    kind: LayerKind
    may_grow: bool


def select(model: nn.Module, layers: Selection, exclude: Selection, observe: Selection) -> dict[str, Selected]:
    """The layers to wrap, by name, in the order of ``model.named_modules()``.

    A layer inside another one that was selected is part of that one, and not selected itself.

    Args:
        model: the model.
        layers: of the layers that can grow, those at which seeds may; ``None`` for all of them.
        exclude: what is left out of ``layers`` and ``observe``; ``None`` for nothing.
        observe: of all modules, those that are observed as layers besides; ``None`` for none, ``"all"`` for those of
            every known kind.

    Raises:
        UnsupportedHostError: nothing is selected, or a name, type or expression matches nothing.
    """
    every = {
        name: module
        for name, module in model.named_modules()
        if name and CONTAINER not in name.split(".") and not isinstance(module, _CONTAINERS)
    } or {"": model}
    kinds = {name: layer_kind(module) for name, module in every.items()}
    growing = {name: module for name, module in every.items() if kinds[name] in GROWING}
    chosen = set(growing) if layers is None else _Matcher("layers", model, every, growing).match(layers)
    observed: set[str] = set()
    if observe == ALL:
        observed = {name for name, kind in kinds.items() if kind is not None}
    elif observe is not None:
        observed = _Matcher("observe", model, every, every).match(observe)
    left_out = set() if exclude is None else _Matcher("exclude", model, every, every).match(exclude)
    names = (chosen | observed) - left_out
    if not names:
        raise UnsupportedHostError(
            f"no layer is selected by layers={layers!r}, observe={observe!r} and exclude={exclude!r}; "
            + ("all that were are excluded" if chosen | observed else "the model has no Linear or convolution layer")
        )
    return {
        name: Selected(module, kinds[name] or graph_pb2.LAYER_TYPE_OTHER, name in chosen)
        for name, module in every.items()
        if name in names and not any(outer in names for outer in _around(name))
    }


class _Matcher:
    """Matches one of the arguments of :func:`select`, which is called ``what`` in errors."""

    def __init__(
        self, what: str, model: nn.Module, every: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module]
    ) -> None:
        self._what = what
        self._model = model
        self._every = every
        self._candidates = candidates

    def match(self, selection: _Given) -> set[str]:
        """Names of the candidates that are selected."""
        if isinstance(selection, str) and selection == ALL_LINEAR:
            return self._all_linear()
        if isinstance(selection, str):
            return self._whole_names(selection)
        if isinstance(selection, type):
            return self._one(selection)
        if callable(selection):
            return {name for name, module in self._candidates.items() if selection(name, module)}
        return set().union(*map(self._one, selection))

    def _all_linear(self) -> set[str]:
        output_layer = getattr(self._model, "get_output_embeddings", lambda: None)()
        return {
            name
            for name, module in self._candidates.items()
            if layer_kind(module) == LINEAR and module is not output_layer
        }

    def _whole_names(self, expression: str) -> set[str]:
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise UnsupportedHostError(
                f"{self._what}={expression!r} is no regular expression ({error}); a list selects by the ends of names"
            ) from None
        return self._found(expression, lambda name, _module: pattern.fullmatch(name) is not None)

    def _one(self, entry: str | type[nn.Module]) -> set[str]:
        if isinstance(entry, type):
            return self._found(entry.__name__, lambda _name, module: isinstance(module, entry))
        return self._found(entry, lambda name, _module: name == entry or name.endswith(f".{entry}"))

    def _found(self, wanted: str, matches: Predicate) -> set[str]:
        found = {name for name, module in self._candidates.items() if matches(name, module)}
        if found:
            return found
        others = [name for name, module in self._every.items() if matches(name, module)]
        if others:
            module = type(self._every[others[0]]).__name__
            hint = f"{others[0]!r} is a {module}, at which nothing can grow; observe= takes it"
        else:
            # Full names first, so that they win over ends that are as near.
            known = dict.fromkeys((*self._candidates, *(name.rsplit(".", 1)[-1] for name in self._candidates)))
            near = get_close_matches(wanted, known, _NEAR_MISSES, 0.5)
            hint = f"near it are {', '.join(near)}" if near else f"there are, for example, {', '.join([*known][:3])}"
        raise UnsupportedHostError(f"{self._what}: {wanted!r} matches no layer; {hint}")


def _around(name: str) -> Iterable[str]:
    """The names of the modules around one."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
