"""The page on blueprints says what the code does, and its program runs."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esperml.kasmina import Geometry, registered
from esperml.v1 import graph_pb2

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "blueprints.md").read_text(encoding="utf-8")
LINEAR, CONV1D, CONV2D = graph_pb2.LAYER_TYPE_LINEAR, graph_pb2.LAYER_TYPE_CONV1D, graph_pb2.LAYER_TYPE_CONV2D
PLACES = {
    "features": [
        Geometry(LINEAR, LINEAR, (7,), (5,)),
        Geometry(LINEAR, LINEAR, (3, 6), (3, 4)),
        Geometry(CONV2D, LINEAR, (2, 5, 6), (4,)),
    ],
    "channels": [
        Geometry(CONV2D, CONV2D, (3, 9, 10), (3, 4, 5)),
        Geometry(CONV1D, CONV1D, (4, 12), (4, 12)),
        Geometry(CONV2D, CONV2D, (2, 6, 6), (5, 3, 3)),
    ],
}
ROWS = [
    tuple(cell.strip("` ") for cell in row)
    for row in re.findall(r"^\| (`\w+`) \| (features|channels) \| (`[^|]+`) \| (`[^|]+`) \|$", PAGE, re.MULTILINE)
]


def symbols(geometry: Geometry, size: int) -> dict[str, int]:
    channels, *lengths = geometry.signal_shape
    return {
        "s": size,
        "i": geometry.in_features,
        "o": geometry.out_features,
        "P": geometry.out_positions,
        "Q": geometry.in_positions,
        "k": 3**geometry.rank,
        "K": 5**geometry.rank,
        "M": math.prod(min(length, 8) for length in lengths),
        "c": channels,
        "L": math.prod(lengths),
        "H": math.prod(length // 2 for length in lengths),
        "e": 2 ** len(lengths),
        "t": 5 ** len(lengths),
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_costs_are_those_of_the_page(row):
    name, at, parameters, operations = row
    blueprint = next(known for known in registered() if known.name == name)
    geometries = [geometry for geometry in PLACES[at] if blueprint.fits(geometry)]
    assert geometries
    for geometry in geometries:
        for size in (1, 3) if blueprint.largest(geometry) > 1 else (1,):
            known = symbols(geometry, size)
            assert eval(parameters, known) == blueprint.cost(geometry, size)
            assert eval(operations, known) == blueprint.flops_at(geometry, size)


def test_every_blueprint_is_on_the_page_with_every_kind_of_place_that_it_fits():
    fitting = {
        (blueprint.name, at)
        for blueprint in registered()
        for at, geometries in PLACES.items()
        if any(blueprint.fits(geometry) for geometry in geometries)
    }
    assert {(name, at) for name, at, *_ in ROWS} == fitting
    assert re.findall(r"^\| `(\w+)` \| [^`|]*`?[^|]*\| (?:features|channels)", PAGE, re.MULTILINE) == [
        blueprint.name for blueprint in registered()
    ]


def test_its_program_runs():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("'mixture', 'scale']")
