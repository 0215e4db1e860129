"""The resend window against a server that is a list."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.client.errors import ClientClosedError, ClientIdConflictError, FrameTooLargeError, InvalidRequestError
from esperml.client.window import ResendWindow
from esperml.v1 import event_pb2, oona_pb2


def frame(*marks: str) -> oona_pb2.StreamRequest:
    events = [event_pb2.Event(event_id=mark) for mark in marks]
    return oona_pb2.StreamRequest(publish=oona_pb2.Publish(kind=event_pb2.KIND_EVENTS, events=events))


def send_all(window: ResendWindow, request_id: int = 10) -> list[tuple[int, int]]:
    """Send everything; what went out as (request id, first sequence)."""
    sent = []
    while (request := window.next_to_send(request_id)) is not None:
        sent.append((request_id, request.publish.first_sequence))
        request_id += 1
    return sent


@pytest.fixture
def window() -> ResendWindow:
    return ResendWindow("me", 1000)


async def test_sequences_count_on_from_what_the_server_expects(window):
    window.resume(5)
    window.add(frame("a", "b"))
    window.add(frame("c"))
    assert send_all(window) == [(10, 5), (11, 7)]
    assert window.next_to_send(99) is None


async def test_what_is_unconfirmed_goes_out_again_with_the_same_sequences(window):
    window.resume(1)
    first, second = window.add(frame("a")), window.add(frame("b"))
    send_all(window)
    window.confirm(10, oona_pb2.Published(first_offset=0, count=1))
    assert (await first.confirmed).count == 1
    assert window.resume(2) == 0
    assert send_all(window, 20) == [(20, 2)]
    window.confirm(20, oona_pb2.Published(first_offset=1, count=1))
    assert (await second.confirmed).count == 1
    assert len(window) == 0


async def test_what_was_stored_is_confirmed_when_the_stream_is_back_and_cannot_be_refused_any_more(window):
    window.resume(1)
    stored, unsent = window.add(frame("a")), window.add(frame("b"))
    window.next_to_send(10)
    # The confirmation was lost with the stream.
    assert window.resume(2) == 0
    assert (await stored.confirmed).duplicates == 1
    # Were it sent again and refused, this one would be given its sequence, and be taken for stored.
    assert send_all(window, 20) == [(20, 2)]
    assert not unsent.confirmed.done()


async def test_a_refused_frame_gives_its_sequences_to_those_behind_it(window):
    window.resume(1)
    bad, good = window.add(frame("a", "b")), window.add(frame("c"))
    send_all(window)
    assert window.refuse(10, InvalidRequestError(oona_pb2.REJECT_REASON_INVALID, "no"))
    with pytest.raises(InvalidRequestError):
        await bad.confirmed
    # The refusal of what left a gap behind it comes late and concerns nobody.
    assert not window.under_way(11)
    assert not window.refuse(11, InvalidRequestError(oona_pb2.REJECT_REASON_INVALID, "gap"))
    assert send_all(window, 20) == [(20, 1)]
    window.confirm(20, oona_pb2.Published(count=1))
    assert (await good.confirmed).count == 1


async def test_a_server_that_lost_its_log_is_noticed_and_numbered_for_anew(window):
    window.resume(1)
    window.add(frame("a"))
    send_all(window)
    window.confirm(10, oona_pb2.Published(count=1))
    window.add(frame("b"))
    assert window.resume(1) == 1
    assert send_all(window) == [(10, 1)]


async def test_a_server_that_stored_more_than_was_sent_has_another_publisher(window):
    window.resume(1)
    window.add(frame("a"))
    send_all(window)
    with pytest.raises(ClientIdConflictError, match="'me'"):
        window.resume(3)


async def test_frames_over_the_servers_limit_fail_alone(window):
    window.resume(1)
    small, large = window.add(frame("a")), window.add(frame("x" * 500))
    assert not window.refuse_next_if_larger_than(200)
    assert window.next_to_send(10) is small.request
    assert window.refuse_next_if_larger_than(200)
    with pytest.raises(FrameTooLargeError, match="limit of 200"):
        await large.confirmed
    assert send_all(window) == []
    assert not small.confirmed.done()


async def test_it_is_full_by_bytes_and_frees_what_is_confirmed(window):
    window.resume(1)
    window.add(frame("x" * 2000))
    assert window.full
    send_all(window)
    window.confirm(10, oona_pb2.Published(count=1))
    assert not window.full


async def test_failing_fails_everything(window):
    waiting = window.add(frame("a"))
    given_up = window.add(frame("b"))
    given_up.confirmed.cancel()
    window.fail(ClientClosedError())
    with pytest.raises(ClientClosedError):
        await waiting.confirmed
    assert not window.full


async def seconds_of_late_refusals(frames: int) -> float:
    """Time to take in the refusals of all that was sent behind a refused frame and went out again meanwhile."""
    window = ResendWindow("me", 10**9)
    window.resume(1)
    for _ in range(frames):
        window.add(frame("a")).confirmed.cancel()
    late = [number for number, _ in send_all(window, 1)]
    error = InvalidRequestError(oona_pb2.REJECT_REASON_INVALID, "no")
    assert window.refuse(late.pop(0), error)
    assert len(send_all(window, frames + 1)) == len(late)
    started_s = time.process_time()
    for number in late:
        assert not window.under_way(number)
        assert not window.refuse(number, error)
    return time.process_time() - started_s


async def test_ten_times_as_many_refused_frames_take_about_ten_times_as_long():
    few_s = min([await seconds_of_late_refusals(500) for _ in range(5)])
    many_s = min([await seconds_of_late_refusals(5000) for _ in range(5)])
    assert many_s < 30 * few_s


class Server:
    """Stores what follows, confirms duplicates, refuses gaps and marks that begin with "bad"."""

    def __init__(self) -> None:
        self.stored: list[str] = []

    def handle(self, request: oona_pb2.StreamRequest) -> str:
        marks = [event.event_id for event in request.publish.events]
        if any(mark.startswith("bad") for mark in marks):
            return "invalid"
        if request.publish.first_sequence > len(self.stored) + 1:
            return "gap"
        self.stored += marks[len(self.stored) + 1 - request.publish.first_sequence :]
        return "stored"


@given(st.data())
async def test_whatever_breaks_every_good_event_is_stored_once_and_in_order(data):
    window, server = ResendWindow("me", 10**6), Server()
    window.resume(1)
    expected: list[str] = []
    answers: list[tuple[int, str]] = []
    request_id = 0
    steps = data.draw(st.lists(st.sampled_from(["good", "bad", "send", "answer", "break"]), max_size=60))
    for step in [*steps, "break", *["send"] * 60, *["answer", "send"] * 120]:
        if step in {"good", "bad"}:
            marks = [f"{step}{len(expected)}-{index}" for index in range(data.draw(st.integers(1, 3)))]
            future = window.add(frame(*marks)).confirmed
            future.add_done_callback(lambda done: done.exception())
            expected += marks if step == "good" else []
        elif step == "send":
            request_id += 1
            if (request := window.next_to_send(request_id)) is not None:
                answers.append((request_id, server.handle(request)))
        elif step == "answer" and answers:
            answered, outcome = answers.pop(0)
            if outcome == "stored":
                window.confirm(answered, oona_pb2.Published())
            else:
                window.refuse(answered, InvalidRequestError(oona_pb2.REJECT_REASON_INVALID, outcome))
        elif step == "break":
            answers.clear()
            assert window.resume(len(server.stored) + 1) == 0
    assert server.stored == expected
    assert len(window) == 0
