"""What a host is, or would be, for a person: its layers as a table, and how many parameters train."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esperml.kasmina.blueprints import Blueprint
from esperml.kasmina.kinds import kind_name
from esperml.kasmina.layers import KasminaLayer

if TYPE_CHECKING:
    from esperml.kasmina.host import Place

_HEADINGS: Final = ("layer", "kind", "reads", "gives", "parameters", "places", "can grow")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a table.

    Attributes:
        layer: name as in ``model.named_modules()``.
        kind: what it computes, in a word.
        calls: times that it runs in one forward pass.
        input_shape: shape of its input without the batch dimension.
        output_shape: shape of its output without the batch dimension.
        parameters: number of its own parameters.
        trainable: how many of these train.
        sources: names of the layers whose input a seed here may read: one for each place.
        blueprints: what may grow at these places.
    """

    layer: str
    kind: str
    calls: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    trainable: int
    sources: tuple[str, ...]
    blueprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerTable:
    """The layers of a host; ``print`` it, or end a notebook's cell with it.

    Attributes:
        rows: one for each layer, in the order in which they first run.
        unused: layers that were selected and did not run, and so are no part of the host.
    """

    rows: tuple[LayerRow, ...]
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, *self._remarks()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.rows
        )
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{remarks}"

    def _remarks(self) -> Iterable[str]:
        places = sum(len(row.sources) for row in self.rows)
        yield f"{len(self.rows)} layers, {places} places"
        if self.unused:
            yield f"selected but not run: {', '.join(self.unused)}"


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters a wrapped model has, and how many of them train.

    Attributes:
        trainable: parameters that train, seeds included.
        total: all parameters, seeds included.
        seeds: parameters of living and fossilised seeds.
    """

    trainable: int
    total: int
    seeds: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f} || "
            f"in seeds: {self.seeds:,}"
        )


def layer_rows(
    layers: Sequence[KasminaLayer], places: Sequence[Place], blueprints: Sequence[Blueprint]
) -> Iterator[LayerRow]:
    """The rows of a host with these layers and places; ``blueprints`` in the order of the places' bit masks."""
    for index, layer in enumerate(layers):
        here = [place for place in places if place.target == index]
        parameters = layer.parameters()
        yield LayerRow(
            layer=layer.name,
            kind=kind_name(layer.type),
            calls=layer.calls,
            input_shape=layer.input_shape,
            output_shape=layer.output_shape,
            parameters=layer.parameter_count,
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            sources=tuple(layers[place.source].name for place in here),
            blueprints=tuple(b.name for n, b in enumerate(blueprints) if any(place.fitting >> n & 1 for place in here)),
        )


def _cells(row: LayerRow) -> Sequence[str]:
    frozen = "" if row.trainable == row.parameters else " (frozen)" if not row.trainable else " (partly frozen)"
    return (
        row.layer or "(the model)",
        row.kind + (f", runs {row.calls} times" if row.calls > 1 else ""),
        "×".join(map(str, row.input_shape)) or "a number",
        "×".join(map(str, row.output_shape)) or "a number",
        f"{row.parameters:,}{frozen}",
        str(len(row.sources)) if row.sources else "–",
        ", ".join(row.blueprints) or "–",
    )
