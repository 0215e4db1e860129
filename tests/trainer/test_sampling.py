"""Drawing mini-batches."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.trainer.sampling import GroupSampler
from esperml.trainer.splitting import split

GROUPS = [[0], [1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]


@given(batch_size=st.integers(1, 14), seed=st.integers(0, 2**32))
def test_a_batch_holds_whole_groups_until_it_is_full(batch_size: int, seed: int) -> None:
    batch = GroupSampler(GROUPS, batch_size, seed=seed).sample()
    assert len(batch) == len(set(batch)) >= min(batch_size, 11)
    for group in GROUPS:
        taken = set(group) & set(batch)
        assert not taken or len(taken) == min(len(group), batch_size)


def test_a_restored_sampler_goes_on_where_it_was() -> None:
    sampler = GroupSampler(GROUPS, 4, seed=1)
    sampler.sample()
    state = json.loads(json.dumps(sampler.state()))
    expected = [sampler.sample() for _ in range(20)]
    other = GroupSampler(GROUPS, 4, seed=99)
    other.restore(state)
    assert [other.sample() for _ in range(20)] == expected


def test_every_step_is_drawn_alike_without_weights() -> None:
    sampler = GroupSampler([[0], [1, 2, 3]], 1, seed=0)
    counts = Counter(sampler.sample()[0] for _ in range(4000))
    assert all(count == pytest.approx(1000, abs=130) for count in counts.values())


def test_groups_are_drawn_by_their_weights() -> None:
    sampler = GroupSampler([[0], [1]], 1, seed=0, weights=[3.0, 1.0])
    counts = Counter(sampler.sample()[0] for _ in range(4000))
    assert counts[0] == pytest.approx(3000, abs=130)


@pytest.mark.parametrize(
    ("groups", "batch_size", "weights", "problem"),
    [
        ([], 4, None, "at least one group"),
        ([[0], []], 4, None, "no group may be empty"),
        ([[0]], 0, None, "batch_size is 0"),
        ([[0]], 1, [0.0], "positive"),
        ([[0]], 1, [float("nan")], "positive"),
        ([[0]], 1, [1.0, 2.0], "one for each group"),
    ],
)
def test_groups_that_cannot_be_drawn_from_are_refused(
    groups: list[list[int]], batch_size: int, weights: list[float] | None, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        GroupSampler(groups, batch_size, seed=0, weights=weights)


def test_the_state_of_another_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="PCG64"):
        GroupSampler([[0]], 1, seed=0).restore({"bit_generator": "MT19937"})


@given(names=st.lists(st.text(max_size=5)), fraction=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_a_split_holds_out_its_share_whatever_the_order(names: list[str], fraction: float, seed: int) -> None:
    held_out = split(names, fraction, seed)
    assert held_out == split(reversed(names), fraction, seed)
    assert set(held_out) == set(names)
    if len(held_out) > 1 and fraction > 0:
        assert 0 < sum(held_out.values()) < len(held_out)
    if fraction == 0 or len(held_out) < 2:
        assert sum(held_out.values()) == round(fraction * len(held_out))


@given(names=st.sets(st.text(max_size=5), min_size=1), more=st.sets(st.text(max_size=5)))
def test_what_was_split_before_stays_where_it_was(names: set[str], more: set[str]) -> None:
    before = split(names, 0.3, 0)
    after = split(names | more, 0.3, 0, before)
    assert {name: after[name] for name in names} == before
    assert set(after) == names | more
