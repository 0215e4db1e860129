"""Several servers of one bus: which of them a client turns to."""

from __future__ import annotations

import pytest

from esperml.client.addresses import Addresses


def test_after_each_failure_the_next_one_is_used_and_after_the_last_the_first():
    addresses = Addresses(" one:1, two:2 ,,three:3,")
    used = []
    for _ in range(4):
        used.append(addresses.present)
        addresses.move_on()
    assert used == ["one:1", "two:2", "three:3", "one:1"]
    assert len(addresses) == 3


@pytest.mark.parametrize("target", ["", " ", ",", " , "])
def test_a_target_that_names_no_server_is_refused(target):
    with pytest.raises(ValueError, match="target: must name a server"):
        Addresses(target)
