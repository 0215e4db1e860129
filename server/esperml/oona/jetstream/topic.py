"""One kind's stream as a gateway knows it: what it holds, who may publish to it, and where an offset lies."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from esperml.oona.jetstream.follower import Follower
from esperml.oona.jetstream.records import FramePart, Joiner, StateRecord, TopicState
from esperml.oona.log import LogDamagedError, LogUnavailableError, StoredFrame, TopicBounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from esperml.oona.jetstream.link import Link, Message
    from esperml.oona.jetstream.names import TopicNames

# Messages with events asked for at once.
_MESSAGES: Final = 256
# Places in the stream that are remembered, by offset.
_POSITIONS: Final = 65_536
# How long to wait for a replica that lags behind, or for a cluster that is out of reach, before asking again.
_PAUSE_S: Final = 0.02
_UNREACHABLE_PAUSE_S: Final = 0.25
# Time for which a stream must have ended too early, in s: a new leader may not have read all of it yet.
_SHORTER_S: Final = 3.0
# Looks after which what should be there counts as missing.
_LOOKS: Final = 100


class TopicStream:
    """What one gateway knows of one kind's stream.

    Args:
        names: the names of the kind.
        link: the connection.
        changed: called when the bounds have changed.
        owned: called with a publisher and the gateway that stores for it from now on, as others say it.

    Attributes:
        names: the names of the kind.
        state: the log behind the last batch that is known.
        sequences: the last sequence of each publisher in this log.
        landed: those of ``awaited`` that were found to be stored.
        awaited: ids of batches whose fate somebody wants to know.
    """

    def __init__(
        self, names: TopicNames, link: Link, changed: Callable[[], None], owned: Callable[[str, str], None]
    ) -> None:
        self.names = names
        self.state = TopicState()
        self.sequences: dict[str, int] = {}
        self.awaited: set[str] = set()
        self.landed: set[str] = set()
        self._link = link
        self._changed = changed
        self._owned = owned
        self._follower = Follower(link, names.stream, names.states, self._apply)
        self._positions: OrderedDict[int, int] = OrderedDict()
        self._shorter_since_s: float | None = None

    @property
    def bounds(self) -> TopicBounds:
        """The extent of the log."""
        state = self.state
        return TopicBounds(state.earliest, state.next, state.next_bytes - state.earliest_bytes)

    @property
    def last_sequence(self) -> int:
        """The stream's last sequence, as far as it is known."""
        return self._follower.last_sequence

    async def catch_up(self, target: int = 0) -> None:
        """Learn what was stored since, at least up to the stream's sequence ``target``.

        Raises:
            LogUnavailableError: the cluster cannot be asked.
            LogDamagedError: there is something in the stream that no bus wrote.
        """
        await self._follower.catch_up(target)

    async def catch_up_with_leader(self) -> None:
        """Learn everything that was stored since, as the leader knows it. Raises as :meth:`catch_up` does.

        Raises:
            LogDamagedError: for a while now the stream has ended before what is known of it.
        """
        last = await self._link.last_sequence(self.names.stream)
        if last >= self.last_sequence:
            self._shorter_since_s = None
            await self.catch_up(last)
            return
        now_s = asyncio.get_running_loop().time()
        if self._shorter_since_s is None:
            self._shorter_since_s = now_s
        elif now_s > self._shorter_since_s + _SHORTER_S:
            raise LogDamagedError(
                f"stream {self.names.stream} ends at message {last}, but this server knows it up to message "
                f"{self.last_sequence}: it was made anew, or the cluster has lost what it had confirmed; start this "
                "server again to go on with what there is"
            )

    def apply_batch(self, base: int, last: int, states: Sequence[tuple[str, bytes]]) -> None:
        """Note a batch that was stored behind sequence ``base``, up to ``last``; ``states`` are its last messages.

        Ignored where something before it is not known yet; of what is known already, the rest is taken.
        """
        if base <= self.last_sequence:
            for sequence, (subject, data) in enumerate(states, last - len(states) + 1):
                self._follower.take(sequence, subject, data)

    def remember(self, offset: int, sequence: int) -> None:
        """Note that the frame that starts at an offset starts with the message of this sequence."""
        self._positions[offset] = sequence
        self._positions.move_to_end(offset)
        if len(self._positions) > _POSITIONS:
            self._positions.popitem(last=False)

    async def read(self, offset: int, max_bytes: int) -> list[StoredFrame]:
        """Frames from the one that holds ``offset``, or the next that is there, in order.

        Waits for as long as the cluster is out of reach. Empty where there is nothing, or what is there is missing.

        Raises:
            LogDamagedError: a frame is not what was written.
        """
        for _ in range(_LOOKS):
            offset = max(offset, self.state.earliest)
            if offset >= self.state.next:
                break
            try:
                if frames := await self._read(offset, max_bytes):
                    return frames
            except LogUnavailableError:
                await self._reachable()
            await asyncio.sleep(_PAUSE_S)
        return []

    async def first(self, wanted: Callable[[FramePart], bool]) -> tuple[int, FramePart] | None:
        """The first message with events for which ``wanted`` holds, as it does for all behind it.

        Returns:
            Its sequence in the stream, and its place.

        Raises:
            LogUnavailableError: the cluster cannot be asked.
        """
        found: tuple[int, FramePart] | None = None
        low, high = 1, self.last_sequence + 1
        while low < high:
            middle = (low + high) // 2
            message = await self._link.get(self.names.stream, middle, self.names.runs)
            if message is None and found is not None:
                raise LogUnavailableError(f"{self.names.stream}: a replica that was asked lags behind another")
            if message is None or message.sequence >= high:
                high = middle
                continue
            part = FramePart.of(message)
            if wanted(part):
                found = message.sequence, part
                high = middle
            else:
                low = message.sequence + 1
        return found

    async def offset_at(self, time_ns: int) -> int:
        """Offset of the first record stored at or after a time. Waits for as long as the cluster is out of reach."""
        while self.state.append_time_ns >= time_ns:
            try:
                found = await self.first(lambda part: part.append_time_ns >= time_ns)
            except LogUnavailableError:
                await self._reachable()
                continue
            if found is None:
                if self.state.earliest >= self.state.next:
                    break
                await asyncio.sleep(_PAUSE_S)  # There is one: the replica that was asked lags.
                continue
            return max(found[1].first_offset, self.state.earliest)
        return self.state.next

    async def _read(self, offset: int, max_bytes: int) -> list[StoredFrame]:
        sequence = self._positions.get(offset)
        if sequence is None:
            found = await self.first(lambda part: part.end > offset)
            if found is None:
                return []
            sequence = found[0]
        joiner = Joiner(self.names.stream)
        while True:
            messages = await self._link.get_many(self.names.stream, sequence, self.names.runs, _MESSAGES, max_bytes)
            for message in messages:
                joiner.add(message)
            frames = [frame for frame in joiner.frames if frame.first_offset + frame.count > offset]
            if frames:
                self.remember(frames[-1].first_offset + frames[-1].count, joiner.next_sequence)
                return frames
            if not messages:
                self._positions.pop(offset, None)
                return []
            sequence = messages[-1].sequence + 1

    async def _reachable(self) -> None:
        """Wait until the cluster answers."""
        while True:
            try:
                await self.catch_up()
            except LogUnavailableError:
                await asyncio.sleep(_UNREACHABLE_PAUSE_S)
            else:
                return

    def _apply(self, _sequence: int, subject: str, data: bytes) -> None:
        record = StateRecord.decode(subject, data)
        before = self.bounds
        self.state = record.topic
        if record.batch_id in self.awaited:
            self.landed.add(record.batch_id)
        if record.publisher is not None and (client_id := self.names.publisher_of(subject)) is not None:
            if record.publisher.sequence:
                self.sequences[client_id] = record.publisher.sequence
            self._owned(client_id, record.publisher.gateway)
        if self.bounds != before:
            self._changed()


def encode_notice(base: int, last: int, states: Sequence[Message]) -> bytes:
    """What a gateway tells the others of a batch that it stored."""
    records = [[message.subject, message.data.decode()] for message in states]
    return json.dumps({"base": base, "last": last, "states": records}, separators=(",", ":")).encode()


def decode_notice(data: bytes) -> tuple[int, int, list[tuple[str, bytes]]]:
    """Base, last sequence and states of a notice. Raises ``ValueError`` for what is none."""
    try:
        body = json.loads(data)
        states = [(str(subject), text.encode()) for subject, text in body["states"]]
        return int(body["base"]), int(body["last"]), states
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("no notice") from error
