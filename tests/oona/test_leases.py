from __future__ import annotations

from esperml.oona.leases import Leases, Span


def test_deadlines_of_what_was_settled_do_not_pile_up_behind_one_long_lease():
    leases = Leases()
    leases.add(Span(0, 0, 0, "held"), 10.0)
    for offset in range(1, 10_000):
        leases.add(Span(offset, offset, offset, "a"), 10.0 + offset)
        if offset != 5_000:
            leases.take(offset, offset)
    assert len(leases._deadlines) < 200
    assert leases.next_deadline_s == 10.0
    leases.take(0, 0)
    assert leases.next_deadline_s == 10.0 + 5_000
