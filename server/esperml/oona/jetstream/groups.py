"""Groups' progress and dead letters in the cluster: one subject for each, of which the last message counts.

A group's progress is saved where it is what this gateway saw last (compare and set on its subject). A gateway that was
taken for dead, and has its groups coordinated by another by now, therefore fails to save and learns of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from esperml.oona.jetstream.follower import Follower
from esperml.oona.jetstream.link import ConflictError, Message, RefusedError, new_id
from esperml.oona.jetstream.names import from_token, to_token
from esperml.oona.jetstream.tasks import say_if_failed
from esperml.oona.jetstream.writer import fail
from esperml.oona.log import (
    DeadLetter,
    GroupProgress,
    LogDamagedError,
    LogError,
    LogFullError,
    LogMovedError,
    LogUnavailableError,
)
from esperml.oona.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esperml.oona.jetstream.link import Link

GroupKey = tuple[int, str]

# Dead letters that go into one batch with the progress. More than these go before it.
_MAX_LETTERS: Final = 900
# Trace of a deleted letter, for gateways that look seldom.
_DELETED_TTL: Final = "24h"
_RETRY_S: Final = 0.1
_FULL_RETRY_S: Final = 5.0


class GroupMovedError(LogMovedError):
    """Another gateway coordinates the group now."""

    def __init__(self, group: str) -> None:
        super().__init__(f"group {group!r} is coordinated by another server now")


@dataclass(slots=True)
class GroupRecord:
    """What the cluster holds of a group.

    Attributes:
        progress: what the group has done.
        gateway: the gateway that coordinates it.
        owners: runs and the members that had them when that was last noted.
        save_id: the save that wrote this.
        sequence: of the message that says so; 0: none does.
        letters: its dead letters by offset, and whether they are being replayed.
    """

    progress: GroupProgress | None = None
    gateway: str = ""
    owners: Mapping[str, str] = field(default_factory=dict)
    save_id: str = ""
    sequence: int = 0
    letters: dict[int, bool] = field(default_factory=dict)


@dataclass(slots=True)
class _Saving:
    """What is to be saved of one group, beyond what is being saved."""

    progress: GroupProgress | None
    letters: dict[int, DeadLetter | None]
    futures: list[asyncio.Future[None]]


class GroupStore:
    """The groups of all kinds, as this gateway knows and changes them.

    Args:
        link: the connection.
        prefix: of subjects and streams.
        gateway: this gateway.
        timeout_s: time after which a save is given up, in s.

    Attributes:
        stream: the stream's name.
        records: what the cluster holds.
        lost: called with a group that another gateway has taken.
        claimed_only: whether a group must be claimed before it can be saved.
    """

    def __init__(self, link: Link, prefix: str, gateway: str, timeout_s: float) -> None:
        self.stream = f"{prefix}_GROUPS".upper()
        self.records: dict[GroupKey, GroupRecord] = {}
        self.claimed_only = False
        self.lost: Callable[[GroupKey], None] = lambda _: None
        self._link = link
        self._prefix = f"{prefix}._group."
        self._gateway = gateway
        self._timeout_s = timeout_s
        self._follower = Follower(link, self.stream, ">", self._apply)
        self._waiting: dict[GroupKey, _Saving] = {}
        self._savers: dict[GroupKey, asyncio.Task[None]] = {}

    async def catch_up(self) -> None:
        """Learn what others have saved. Raises as :meth:`Follower.catch_up` does."""
        await self._follower.catch_up(await self._link.last_sequence(self.stream))

    def save(
        self, key: GroupKey, progress: GroupProgress, letters: Mapping[int, DeadLetter | None]
    ) -> asyncio.Future[None]:
        """Save; see :meth:`esperml.oona.log.Log.save_group`. What waits for an earlier save becomes one."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = _Saving(progress, dict(letters), [future])
        else:
            waiting.progress = progress
            waiting.letters.update(letters)
            waiting.futures.append(future)
        if key not in self._savers:
            saver = asyncio.create_task(self._save(key), name=f"oona-group-{key[1]}")
            saver.add_done_callback(say_if_failed)
            self._savers[key] = saver
        return future

    async def claim(self, key: GroupKey) -> bool:
        """Coordinate a group from now on, unless another gateway was faster. Returns whether it was not.

        Raises:
            LogUnavailableError: it could not be saved.
        """
        record = self.records.setdefault(key, GroupRecord())
        try:
            await self._store_once(key, record, _Saving(record.progress, {}, []), new_id())
        except LogUnavailableError:
            # Somebody was faster, or it was saved and only the confirmation got lost.
            await self.catch_up()
        return record.gateway == self._gateway

    def forget_claims(self) -> None:
        """Save nothing of any group until it is claimed again."""
        for record in self.records.values():
            if record.gateway == self._gateway:
                record.gateway = ""

    async def save_owners(self, key: GroupKey, owners: Mapping[str, str]) -> None:
        """Note which member has which runs. Raises :class:`LogUnavailableError`."""
        body = json.dumps(dict(owners), separators=(",", ":")).encode()
        await self._link.store(Message(f"{self._root(key)}.owners", body, {}))

    async def drain(self) -> None:
        """Wait until nothing waits to be saved."""
        while self._savers:
            await asyncio.wait(list(self._savers.values()))

    async def dead_letters(self, key: GroupKey, first: int, limit: int) -> list[DeadLetter]:
        """Dead letters from an offset on; see :meth:`esperml.oona.log.Log.dead_letters`."""
        if saver := self._savers.get(key):
            await asyncio.wait([saver])
        await self.catch_up()
        record = self.records.get(key)
        offsets = sorted(offset for offset in (record.letters if record else ()) if offset >= first)[:limit]
        found = await self._link.get_last(self.stream, [self._letter_subject(key, offset) for offset in offsets])
        letters = [decode_letter(message.subject, message.data) for message in found if message.data]
        return sorted(letters, key=lambda letter: letter.offset)

    async def _save(self, key: GroupKey) -> None:
        try:
            while (saving := self._waiting.pop(key, None)) is not None:
                try:
                    await self._store(key, saving)
                except LogError as error:
                    for future in saving.futures:
                        fail(future, error)
                else:
                    for future in saving.futures:
                        if not future.done():
                            future.set_result(None)
                finally:
                    # Where neither happened, the log says what did.
                    for future in saving.futures:
                        fail(future, LogUnavailableError(f"the progress of group {key[1]!r} was not saved"))
        finally:
            del self._savers[key]

    async def _store(self, key: GroupKey, saving: _Saving) -> None:
        """Save, however often it must be tried.

        Raises:
            GroupMovedError: another gateway has the group.
            LogUnavailableError: it could not be saved in time.
        """
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        mine = {new_id()}
        record = self.records.setdefault(key, GroupRecord())
        held = record.gateway == self._gateway
        if self.claimed_only and not held:
            raise GroupMovedError(key[1])
        while True:
            save_id = new_id()
            mine.add(save_id)
            try:
                await self._store_once(key, record, saving, save_id)
            except ConflictError as error:
                problem: LogUnavailableError = error
            except RefusedError as error:
                if error.full:
                    raise LogFullError(str(error), _FULL_RETRY_S) from error
                problem = error
            except LogUnavailableError as error:
                problem = error
            else:
                return
            try:
                await self.catch_up()
            except LogUnavailableError as error:
                problem = error
            if record.save_id in mine:
                return  # It was saved, and only its confirmation got lost.
            if held and record.gateway != self._gateway:
                raise GroupMovedError(key[1])
            if asyncio.get_running_loop().time() > deadline_s:
                raise problem
            await asyncio.sleep(_RETRY_S)

    async def _store_once(self, key: GroupKey, record: GroupRecord, saving: _Saving, save_id: str) -> None:
        letters = [
            Message(
                self._letter_subject(key, offset),
                b"" if letter is None else encode_letter(letter),
                {"Nats-TTL": _DELETED_TTL} if letter is None else {},
            )
            for offset, letter in saving.letters.items()
        ]
        while len(letters) > _MAX_LETTERS:
            await self._link.store_batch(letters[:_MAX_LETTERS], new_id())
            del letters[:_MAX_LETTERS]
        expected = {"Nats-Expected-Last-Subject-Sequence": str(record.sequence)}
        body = _encode_progress(saving.progress, self._gateway, save_id)
        progress = Message(f"{self._root(key)}.progress", body, expected)
        if letters:
            last = await self._link.store_batch([progress, *letters], new_id())
        else:
            last = await self._link.store(progress)
        record.progress = saving.progress
        record.gateway, record.save_id = self._gateway, save_id
        record.sequence = last - len(letters)
        for offset, letter in saving.letters.items():
            _note_letter(record, offset, None if letter is None else letter.replaying)

    def _apply(self, sequence: int, subject: str, data: bytes) -> None:
        if not subject.startswith(self._prefix):
            return  # A gateway lives.
        try:
            kind, token, what, *rest = subject.removeprefix(self._prefix).split(".")
            record = self.records.setdefault(key := (int(kind), from_token(token)), GroupRecord())
        except ValueError as error:
            raise LogDamagedError(f"{subject} is no subject of a bus") from error
        before = record.gateway
        try:
            if what == "letter":
                _note_letter(record, int(rest[0]), decode_letter(subject, data).replaying if data else None)
            elif what == "owners":
                record.owners = {str(run_id): str(member) for run_id, member in json.loads(data).items()}
            elif sequence > record.sequence:  # Our own were noted when they were saved.
                # Whatever it says: the next save takes its place.
                record.sequence = sequence
                body = json.loads(data)
                progress = _decode_progress(body)
                record.gateway, record.save_id = str(body["gateway"]), str(body["save"])
                record.progress = record.progress if progress is None else progress
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise LogDamagedError(f"what is on {subject} was not written by a bus") from error
        if before == self._gateway != record.gateway:
            self.lost(key)

    def _root(self, key: GroupKey) -> str:
        return f"{self._prefix}{key[0]}.{to_token(key[1])}"

    def _letter_subject(self, key: GroupKey, offset: int) -> str:
        return f"{self._root(key)}.letter.{offset}"


def _note_letter(record: GroupRecord, offset: int, replaying: bool | None) -> None:
    if replaying is None:
        record.letters.pop(offset, None)
    else:
        record.letters[offset] = replaying


def _encode_progress(progress: GroupProgress | None, gateway: str, save_id: str) -> bytes:
    body: dict[str, object] = {"gateway": gateway, "save": save_id}
    if progress is not None:
        body |= {
            "committed": progress.committed,
            "done": list(progress.done),
            "attempts": list(progress.attempts),
        }
    return json.dumps(body, separators=(",", ":")).encode()


def _decode_progress(body: Mapping[str, Any]) -> GroupProgress | None:
    """What a group has done, of its JSON; None where it says nothing of that."""
    if "committed" not in body:
        return None
    attempts = (
        (int(first), int(last), int(deliveries), int(failures))
        for first, last, deliveries, failures in body["attempts"]
    )
    done = RangeSet((int(first), int(last)) for first, last in body["done"])
    return GroupProgress(int(body["committed"]), done, tuple(attempts))


def encode_letter(letter: DeadLetter) -> bytes:
    """A dead letter as JSON."""
    body = {
        "offset": letter.offset,
        "append_time_ns": letter.append_time_ns,
        "event": base64.b64encode(letter.event).decode(),
        "attempts": letter.attempts,
        "time_ns": letter.time_ns,
        "reason": letter.reason,
        "replaying": letter.replaying,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def decode_letter(subject: str, data: bytes) -> DeadLetter:
    """A dead letter of its JSON. Raises :class:`LogDamagedError` where it is none."""
    try:
        body: dict[str, Any] = json.loads(data)
        body["event"] = base64.b64decode(body["event"], validate=True)
        body |= {name: int(body[name]) for name in ("offset", "append_time_ns", "attempts", "time_ns", "reason")}
        return DeadLetter(**body)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise LogDamagedError(f"the dead letter on {subject} was not written by a bus") from error
