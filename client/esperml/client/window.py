"""What was published and is not yet confirmed. Pure: it knows sequences and frames, no network."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esperml.client.errors import ClientIdConflictError, FrameTooLargeError
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from esperml.client.errors import OonaError

# Most bytes by which request id, sequence and a longer length prefix make a frame grow when it is sent.
_NUMBERS_BYTES: Final = 26


@dataclass(slots=True, eq=False)
class Unconfirmed:
    """A frame that the server has not confirmed.

    Attributes:
        request: the frame. Its sequence and request id are filled in when it is sent.
        count: events in it.
        size: its bytes, at most.
        confirmed: resolved with the server's confirmation, or with the error.
    """

    request: oona_pb2.StreamRequest
    count: int
    size: int
    confirmed: asyncio.Future[oona_pb2.Published]


class ResendWindow:
    """Unconfirmed frames in the order of their sequences, and how many of them the present stream has been sent.

    Sequences are given out when a frame is sent for the first time. A frame that the server refuses for good gives its
    sequences back, so that those behind it close the gap.
    """

    def __init__(self, client_id: str, max_bytes: int) -> None:
        self._client_id = client_id
        self._max_bytes = max_bytes
        self._frames: deque[Unconfirmed] = deque()
        self._sent = 0
        # What the present stream was sent and has not answered, by request id.
        self._under_way: dict[int, Unconfirmed] = {}
        self._bytes = 0
        # Sequence of the first unconfirmed event; unknown until a server has said it once.
        self._first_sequence: int | None = None
        self._next_sequence = 0
        # One after the highest sequence that any stream was sent: no honest server has stored more.
        self._end_sequence = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def full(self) -> bool:
        """Whether a publisher must wait. One frame always fits, however large."""
        return self._bytes >= self._max_bytes

    @property
    def next_sequence(self) -> int:
        """Sequence of the next event to be sent. 0 before a server has said it."""
        return self._next_sequence

    def add(self, request: oona_pb2.StreamRequest) -> Unconfirmed:
        """Take in a publish request and return what stands for it. Needs a running event loop."""
        future: asyncio.Future[oona_pb2.Published] = asyncio.get_running_loop().create_future()
        frame = Unconfirmed(request, len(request.publish.events), request.ByteSize() + _NUMBERS_BYTES, future)
        self._frames.append(frame)
        self._bytes += frame.size
        return frame

    def resume(self, server_next: int) -> int:
        """Start over with the sequence that the server expects: everything unconfirmed counts as not sent.

        What lies below is stored, though its confirmation was lost: it is confirmed here and does not go out again, for
        were it refused now, what follows would be given its sequences, and be taken for stored.

        Returns:
            How many confirmed events the server has lost: 0 unless its log was lost or replaced. What is unconfirmed
            is then numbered anew from what the server expects.

        Raises:
            ClientIdConflictError: the server has stored more under this id than was ever sent from here.
        """
        self.rewind()
        lost = 0
        if self._first_sequence is not None:
            if server_next > self._end_sequence:
                raise ClientIdConflictError(self._client_id)
            if server_next >= self._first_sequence:
                while self._frames and self._first_sequence + self._frames[0].count <= server_next:
                    frame = self._frames[0]
                    self._remove(frame)
                    self._first_sequence += frame.count
                    if not frame.confirmed.done():
                        frame.confirmed.set_result(oona_pb2.Published(duplicates=frame.count))
                self._next_sequence = self._first_sequence
                return 0
            lost = self._first_sequence - server_next
        self._first_sequence = self._next_sequence = self._end_sequence = server_next
        return lost

    def next_to_send(self, request_id: int) -> oona_pb2.StreamRequest | None:
        """The next frame that this stream has not been sent, numbered, or None."""
        if self._sent == len(self._frames):
            return None
        frame = self._frames[self._sent]
        frame.request.request_id = request_id
        self._under_way[request_id] = frame
        frame.request.publish.first_sequence = self._next_sequence
        self._next_sequence += frame.count
        self._end_sequence = max(self._end_sequence, self._next_sequence)
        self._sent += 1
        return frame.request

    def confirm(self, request_id: int, published: oona_pb2.Published) -> None:
        """Take out the frame that the server has confirmed. An answer to what is no longer under way is ignored."""
        if (frame := self._under_way.get(request_id)) is None:
            return
        # The server answers in the order of the stream, so that this is always the first.
        self._remove(frame)
        if self._first_sequence is not None:
            self._first_sequence += frame.count
        if not frame.confirmed.done():
            frame.confirmed.set_result(published)

    def refuse(self, request_id: int, error: OonaError) -> bool:
        """Fail the frame and give its sequences back; what was sent behind it must be sent again.

        Returns whether the answer was to a frame under way. Answers to frames that were refused because one before them
        was come later and find nothing under their request id.
        """
        if (frame := self._under_way.get(request_id)) is None:
            return False
        self._remove(frame)
        self.rewind()
        if not frame.confirmed.done():
            frame.confirmed.set_exception(error)
        return True

    def rewind(self) -> None:
        """Count everything unconfirmed as not sent, to be sent again with the same sequences."""
        self._under_way.clear()
        self._sent = 0
        if self._first_sequence is not None:
            self._next_sequence = self._first_sequence

    def under_way(self, request_id: int) -> bool:
        """Whether a frame was sent under this id and is not answered yet."""
        return request_id in self._under_way

    def refuse_next_if_larger_than(self, limit: int) -> bool:
        """Fail the frames that are to be sent next and are over the server's limit. Returns whether there were any."""
        refused = False
        while self._sent < len(self._frames) and (frame := self._frames[self._sent]).size > limit:
            refused = True
            self._remove(frame)
            if not frame.confirmed.done():
                frame.confirmed.set_exception(FrameTooLargeError(frame.size, limit))
        return refused

    def fail(self, error: OonaError) -> None:
        """Fail every frame."""
        for frame in self._frames:
            if not frame.confirmed.done():
                frame.confirmed.set_exception(error)
        self._frames.clear()
        self._under_way.clear()
        self._sent = self._bytes = 0

    def _remove(self, frame: Unconfirmed) -> None:
        index = self._frames.index(frame)
        del self._frames[index]
        if index < self._sent:
            self._sent -= 1
            self._under_way.pop(frame.request.request_id, None)
        self._bytes -= frame.size
