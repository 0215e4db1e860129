from __future__ import annotations

import grpc
from hypothesis import given
from hypothesis import strategies as st

from esperml.client.flow import FlowControl
from esperml.client.retry import RETRYABLE, RETRYABLE_REJECTIONS, Backoff
from esperml.v1 import oona_pb2


def test_waiting_times_double_up_to_the_longest_and_are_jittered():
    backoff = Backoff(initial_s=1, longest_s=4)
    for ceiling in (1, 2, 4, 4):
        assert ceiling / 2 <= backoff.next_delay() <= ceiling
    backoff.reset()
    assert backoff.next_delay() <= 1


@given(st.floats(0, 100))
def test_a_server_that_names_a_time_is_asked_no_earlier(at_least_s):
    backoff = Backoff(initial_s=1, longest_s=4)
    assert at_least_s <= backoff.next_delay(at_least_s) <= max(1.1 * at_least_s, 1)


def test_only_what_time_mends_is_asked_for_again():
    assert {
        oona_pb2.REJECT_REASON_STORAGE,
        oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED,
    } == RETRYABLE_REJECTIONS


def test_what_a_person_must_mend_is_not_tried_again():
    assert grpc.StatusCode.UNAVAILABLE in RETRYABLE
    assert RETRYABLE.isdisjoint(
        {
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.UNIMPLEMENTED,
            grpc.StatusCode.ABORTED,
            grpc.StatusCode.DATA_LOSS,
        }
    )


@given(st.integers(1, 20), st.integers(20, 200), st.lists(st.integers(1, 10)))
def test_what_is_granted_and_not_taken_never_exceeds_the_credit(messages, size, records):
    flow = FlowControl(messages, size)
    granted, granted_bytes = flow.open()
    for record in records:
        assert granted >= 1, "a reader that takes everything is never left without credit"
        assert granted_bytes >= record
        granted -= 1
        granted_bytes -= record
        if (more := flow.take(1, record)) is not None:
            granted += more[0]
            granted_bytes += more[1]
        assert granted <= messages
        assert granted_bytes <= size


def test_a_new_stream_gets_credit_for_what_does_not_wait_already():
    flow = FlowControl(10, 100)
    flow.take(1, 5)
    assert flow.open(4, 60) == (6, 40)
    assert flow.open(20, 200) == (0, 0)
