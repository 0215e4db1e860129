from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esperml.trainer.arena.hosts import DEMO_HOSTS, SHAPES, Family, HostSpec, build, sample_hosts
from esperml.trainer.arena.tasks import load_task


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_sampled_hosts_are_distinct_reproducible_and_never_the_demos(seed: int, count: int) -> None:
    hosts = sample_hosts(count, seed)
    assert hosts == sample_hosts(count + 5, seed)[:count]
    structures = [(spec.task, spec.shape, spec.widths, spec.silent) for spec in hosts]
    assert len(set(structures)) == count
    assert not {(spec.task, spec.widths) for spec in hosts} & {(s.task, s.widths) for s in DEMO_HOSTS.values()}
    assert len({spec.name for spec in hosts}) == count


def test_sampled_hosts_hold_the_healthy_the_narrow_and_the_silent_in_every_shape() -> None:
    hosts = sample_hosts(200, 0)
    assert set(Counter(spec.shape for spec in hosts)) == set(SHAPES)
    narrow = [spec for spec in hosts if min(spec.widths) <= 8 and spec.shape != "convolution"]
    silent = [spec for spec in hosts if spec.silent]
    healthy = [spec for spec in hosts if min(spec.widths) > 8 and not spec.silent]
    assert min(map(len, (narrow, silent, healthy))) > 10


@pytest.mark.parametrize("spec", [*DEMO_HOSTS.values(), *sample_hosts(40, 1)], ids=lambda spec: spec.name)
def test_a_host_maps_its_tasks_inputs_to_its_classes_and_every_weight_gets_a_gradient(spec: HostSpec) -> None:
    task = load_task(spec.task)
    host = build(spec)
    outputs = host(task.train.inputs[:8])
    assert outputs.shape == (8, task.classes)
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in host.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_follow_from_the_seed_and_the_global_generator_is_left_alone(shape: str) -> None:
    spec = HostSpec("mnist1d", (8, 6, 4), shape=shape, seed=3)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = build(spec).state_dict()
    assert torch.equal(torch.rand(1), expected)
    second = build(spec).state_dict()
    other = build(HostSpec("mnist1d", (8, 6, 4), shape=shape, seed=4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_units_of_a_silent_layer_do_not_respond() -> None:
    spec = HostSpec("digits", (16, 32), silent=(1,), silent_units=3)
    host = build(spec)
    activations = host[:4](load_task("digits").train.inputs)
    assert int((activations.max(dim=0).values > 0).sum()) <= 3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (4, 0)}, "widths"),
        ({"shape": "ring"}, "shape"),
        ({"shape": "branch", "widths": (4, 4)}, "widths"),
        ({"silent": (3,)}, "silent"),
        ({"silent": (0,), "shape": "residual"}, "silent"),
    ],
)
def test_a_host_that_cannot_be_is_refused_by_field(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        HostSpec(**{"task": "digits", "widths": (8, 8), **fields})


def test_convolutions_over_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="does not suit the table"):
        build(HostSpec("tabular-0", (4, 4), shape="convolution"))


def test_the_number_of_hosts_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"^count:"):
        sample_hosts(0, 0)


def test_tables_never_get_convolutions() -> None:
    family = Family(tasks={"tabular-1": 1.0}, shapes={"convolution": 1.0})
    assert {spec.shape for spec in sample_hosts(5, 0, family)} == {"chain"}


def test_labels_tell_hosts_apart() -> None:
    labels = HostSpec("digits", (8, 4), silent=(1,), seed=9).labels()
    assert labels["task"] == "digits"
    assert labels["widths"] == "(8, 4)"
    assert labels["seed"] == "9"
