"""Learns what others store in a stream."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from esperml.oona.jetstream.link import Link

_MESSAGES: Final = 1000
_BYTES: Final = 4 * 2**20
# How long to wait for a replica that lags behind, and after how many looks to ask the leader, who lags behind nobody.
_PAUSE_S: Final = 0.02
_LOOKS: Final = 50


class Follower:
    """Reads the messages of a stream on some subjects, in order, each once.

    Args:
        link: the connection.
        stream: the stream.
        subjects: which messages.
        apply: called with the sequence, subject and body of each.

    Attributes:
        last_sequence: everything up to this sequence is known.
    """

    def __init__(self, link: Link, stream: str, subjects: str, apply: Callable[[int, str, bytes], None]) -> None:
        self.last_sequence = 0
        self._link = link
        self._stream = stream
        self._subjects = subjects
        self._apply = apply
        self._catching_up = asyncio.Lock()

    def take(self, sequence: int, subject: str, data: bytes) -> None:
        """Apply the next message; ignored where it, or a later one, is known."""
        if sequence > self.last_sequence:
            self.last_sequence = sequence
            self._apply(sequence, subject, data)

    async def catch_up(self, target: int = 0) -> None:
        """Read what was stored since, at least up to the stream's sequence ``target``.

        Raises:
            LogUnavailableError: the cluster cannot be asked.
            LogDamagedError: there is something in the stream that no bus wrote.
        """
        async with self._catching_up:
            looks = 0
            while True:
                found = await self._link.get_many(
                    self._stream, self.last_sequence + 1, self._subjects, _MESSAGES, _BYTES
                )
                for message in found:
                    self.take(message.sequence, message.subject, message.data)
                if found:
                    continue
                if self.last_sequence >= target:
                    return
                looks += 1
                if looks > _LOOKS:
                    break
                await asyncio.sleep(_PAUSE_S)
            await self._catch_up_with_leader(target)

    async def _catch_up_with_leader(self, target: int) -> None:
        while self.last_sequence < target:
            query = {"seq": self.last_sequence + 1, "next_by_subj": self._subjects}
            message = await self._link.get_from_leader(self._stream, query)
            if message is None:
                # The last messages are gone: not everything is kept for ever.
                self.last_sequence = target
            else:
                self.take(message.sequence, message.subject, message.data)
