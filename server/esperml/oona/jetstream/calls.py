"""Calls that only a group's coordinator can answer, passed on to it by the gateway that was asked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from esperml.oona.jetstream.members import decode_rejected
from esperml.oona.log import LogError
from esperml.oona.rejection import RequestRejectedError, from_log_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from nats.aio.msg import Msg

    from esperml.oona.jetstream.link import Link
    from esperml.v1 import event_pb2


@dataclass(frozen=True, slots=True)
class GroupCall:
    """Something to do with dead letters of a group.

    Attributes:
        name: what.
        kind: the log.
        group: the group.
        offsets: which. Empty: all.
    """

    name: Literal["replay", "purge"]
    kind: event_pb2.Kind.ValueType
    group: str
    offsets: Sequence[int]


async def call_coordinator(link: Link, subject: str, call: GroupCall) -> int:
    """Have a call answered by the gateway that listens on a subject. Returns how many letters it was.

    Raises:
        RequestRejectedError: the coordinator refused it.
        LogUnavailableError: it does not answer.
    """
    answer = await link.ask(subject, json.dumps(asdict(call)).encode())
    if answer[:1] == b"!":
        raise decode_rejected(answer[1:])
    return int(answer)


async def answer_call(link: Link, message: Msg, work: Callable[[GroupCall], Awaitable[int]]) -> None:
    """Answer a call of another gateway."""
    call = GroupCall(**json.loads(message.data))
    try:
        answer = str(await work(call)).encode()
    except RequestRejectedError as error:
        answer = b"!" + error.to_proto().SerializeToString()
    except LogError as error:
        answer = b"!" + from_log_error(error).to_proto().SerializeToString()
    await link.publish(message.reply, answer)
