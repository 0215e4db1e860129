"""The connection to a NATS cluster: the few calls that the engine makes, with errors that the engine's callers know."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import nats.errors

from esperml.oona.jetstream.connecting import connect, split_addresses, without_passwords
from esperml.oona.log import LogUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from esperml.settings import JetStreamSettings

_T = TypeVar("_T")

MAX_BATCH_MESSAGES: Final = 1000
"""Most messages that a server takes in one atomic batch."""

# A batch whose leader went away is answered by nobody; a new leader is there after a few seconds at most.
_REQUEST_TIMEOUT_S: Final = 3.0
# Head room under the server's limit on messages for headers and subject.
_HEADER_ROOM: Final = 4096
_LARGEST_MESSAGE: Final = 2**20
# Subjects that one request for last messages may name.
_MULTI_SUBJECTS: Final = 512

_WRONG_LAST_SEQUENCE: Final = 10071
_WRONG_LAST_SUBJECT_SEQUENCE: Final = 10164
_NOT_FOUND: Final = 10037
# What trying again at once does not mend: no resources, storage full, over the stream's or the account's limit.
_FULL: Final = frozenset({10002, 10023, 10028, 10047, 10077, 10120, 10122})


class RefusedError(LogUnavailableError):
    """The cluster answered, and does not do it.

    Attributes:
        code: JetStream's number for why; 0 where it gave none.
        description: why, in its words.
        full: whether it lacks room, so that trying again at once is of no use.
    """

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"the cluster refuses: {description}")
        self.description = description
        self.code = code
        self.full = code in _FULL


class ConflictError(RefusedError):
    """Something else was stored since the sequence that the writer had expected to be the last."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message to be stored.

    Attributes:
        subject: its subject.
        data: its body.
        headers: its headers.
    """

    subject: str
    data: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as a stream holds it.

    Attributes:
        sequence: its number in the stream.
        subject: its subject.
        data: its body.
        headers: its headers.
    """

    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str]


class Link:
    """A connection to the cluster that is made again whenever it breaks.

    Attributes:
        max_message_bytes: most bytes that a message's body may have.
        clustered: whether the server is one of several.
    """

    def __init__(self, client: Client, servers: Sequence[str]) -> None:
        self._client = client
        self._servers = without_passwords(servers)
        self.max_message_bytes = min(client.max_payload - _HEADER_ROOM, _LARGEST_MESSAGE)
        self.clustered = bool(client._server_info.get("cluster"))

    @classmethod
    async def open(cls, settings: JetStreamSettings) -> Link:
        """Connect.

        Raises:
            LogUnavailableError: none of the servers answers in time, or they do not let us in.
        """
        return cls(await connect(settings), split_addresses(settings.servers))

    async def close(self) -> None:
        """Let the connection go."""
        with suppress(nats.errors.Error, OSError, TimeoutError):
            await self._client.close()

    async def api(self, call: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Make a call of JetStream's API, for example ``STREAM.INFO.NAME``.

        Raises:
            RefusedError: the cluster answered with an error.
            LogUnavailableError: no answer in time.
        """
        message = await self._request(f"$JS.API.{call}", json.dumps(body).encode())
        answer: dict[str, Any] = json.loads(message.data)
        _raise_error(answer)
        return answer

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send what is not stored. It is lost where nobody listens, and where the cluster is out of reach."""
        if self._client.is_connected:
            with suppress(nats.errors.Error):
                await self._client.publish(subject, data, reply=reply)

    async def subscribe(self, subject: str, on_message: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Call ``on_message`` with every message that is sent to ``subject``.

        Raises:
            LogUnavailableError: there is no connection.
        """
        self._check_connected()
        try:
            return await self._client.subscribe(subject, cb=on_message)
        except nats.errors.Error as error:
            raise self._unreachable(error) from error

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End what :meth:`subscribe` began."""
        with suppress(nats.errors.Error):
            await subscription.unsubscribe()

    async def ask(self, subject: str, data: bytes) -> bytes:
        """Ask whoever listens on a subject. Raises :class:`LogUnavailableError` where nobody answers in time."""
        return (await self._request(subject, data)).data

    async def store(self, message: Message) -> int:
        """Store one message. Returns its sequence; raises as :meth:`store_batch` does."""
        return await self._stored(message.subject, message.data, dict(message.headers))

    async def store_batch(self, messages: Sequence[Message], batch_id: str, last_sequence: int | None = None) -> int:
        """Store messages, all or none, and only where the stream's last sequence is ``last_sequence``, if given.

        Returns:
            The sequence of the last of them.

        Raises:
            ConflictError: the stream's last sequence is another.
            RefusedError: nothing was stored.
            LogUnavailableError: no answer; they may be stored now, or become so later, or never.
        """
        for number, message in enumerate(messages, 1):
            headers = {**message.headers, "Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)}
            if number == 1 and last_sequence is not None:
                headers["Nats-Expected-Last-Sequence"] = str(last_sequence)
            if number == len(messages):
                headers["Nats-Batch-Commit"] = "1"
                return await self._stored(message.subject, message.data, headers)
            self._check_connected()
            try:
                await self._client.publish(message.subject, message.data, headers=headers)
            except nats.errors.Error as error:
                raise self._unreachable(error) from error
        raise ValueError("messages: there must be at least one")

    async def get(self, stream: str, sequence: int, subject: str) -> Stored | None:
        """The first message from ``sequence`` on whose subject matches, or None. Of any replica: it may lag behind."""
        found = await self.get_many(stream, sequence, subject, messages=1, max_bytes=0)
        return found[0] if found else None

    async def get_many(self, stream: str, sequence: int, subject: str, messages: int, max_bytes: int) -> list[Stored]:
        """Messages from ``sequence`` on whose subject matches, in order, of any replica: it may lag behind.

        Not many more than ``max_bytes`` of them; 0: no limit.

        Raises:
            LogUnavailableError: no answer in time.
        """
        query: dict[str, object] = {"seq": sequence, "next_by_subj": subject, "batch": messages}
        if max_bytes:
            query["max_bytes"] = max_bytes
        return await self._get(stream, query)

    async def get_last(self, stream: str, subjects: Sequence[str]) -> list[Stored]:
        """The last message on each of the subjects that has one, of any replica. Raises as :meth:`get_many` does."""
        found: list[Stored] = []
        for at in range(0, len(subjects), _MULTI_SUBJECTS):
            found += await self._get(stream, {"multi_last": list(subjects[at : at + _MULTI_SUBJECTS])})
        return found

    async def _get(self, stream: str, query: Mapping[str, object]) -> list[Stored]:
        self._check_connected()
        inbox = self._client.new_inbox()
        try:
            subscription = await self._client.subscribe(inbox)
            try:
                await self._client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(query).encode(), reply=inbox)
                found: list[Stored] = []
                while True:
                    message = await _cancellable(subscription.next_msg(_REQUEST_TIMEOUT_S))
                    headers = message.headers or {}
                    if "Nats-Sequence" not in headers:
                        if headers.get("Status") == "503":
                            raise self._unreachable(f"no server holds stream {stream} now")
                        return found
                    found.append(Stored(int(headers["Nats-Sequence"]), headers["Nats-Subject"], message.data, headers))
            finally:
                await subscription.unsubscribe()
        except nats.errors.Error as error:
            raise self._unreachable(error) from error

    async def get_from_leader(self, stream: str, query: Mapping[str, object]) -> Stored | None:
        """The message that a query of ``STREAM.MSG.GET`` finds, or None. The leader lags behind nobody.

        Raises:
            LogUnavailableError: no answer in time.
        """
        try:
            message = (await self.api(f"STREAM.MSG.GET.{stream}", query))["message"]
        except RefusedError as error:
            if error.code == _NOT_FOUND:
                return None
            raise
        data = base64.b64decode(message.get("data", ""))
        return Stored(message["seq"], message["subject"], data, {})

    async def last_sequence(self, stream: str) -> int:
        """The stream's last sequence, of its leader. Raises as :meth:`api` does."""
        try:
            info = await self.api(f"STREAM.INFO.{stream}", {})
        except RefusedError as error:
            raise RefusedError(error.code, f"{stream}: {error.description}") from error
        sequence: int = info["state"]["last_seq"]
        return sequence

    async def _stored(self, subject: str, data: bytes, headers: dict[str, str]) -> int:
        answer = json.loads((await self._request(subject, data, headers)).data)
        _raise_error(answer)
        sequence: int = answer["seq"]
        return sequence

    async def _request(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> Msg:
        self._check_connected()
        try:
            asked = self._client.request(subject, data, timeout=_REQUEST_TIMEOUT_S, headers=headers)
            return await _cancellable(asked)
        except nats.errors.Error as error:
            raise self._unreachable(error) from error

    def _check_connected(self) -> None:
        # The client would keep what it cannot send, and send it who knows when.
        if not self._client.is_connected:
            raise self._unreachable("there is no connection")

    def _unreachable(self, why: object) -> LogUnavailableError:
        return LogUnavailableError(f"the cluster at {self._servers} does not answer: {str(why) or type(why).__name__}")


async def _cancellable(call: Awaitable[_T]) -> _T:
    """Await a call of the client, and end as cancelled where the task was cancelled meanwhile.

    The client awaits its answers with ``asyncio.wait_for``, which before Python 3.12 forgets a cancellation that comes
    as the answer does (gh-86296). Who waits for the cancelled task's end would wait for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    answer = await call
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return answer


def new_id() -> str:
    """A name that nobody else has."""
    return secrets.token_hex(12)


def _raise_error(answer: Mapping[str, Any]) -> None:
    if (error := answer.get("error")) is None:
        return
    code = error.get("err_code", 0)
    kind = ConflictError if code in {_WRONG_LAST_SEQUENCE, _WRONG_LAST_SUBJECT_SEQUENCE} else RefusedError
    raise kind(code, error.get("description", "it does not say why"))
