"""Which gateway coordinates which group.

Each gateway says a few times in every ``lease_s`` that it lives, with a message that the cluster stores: so that the
others hear it, and so that it knows itself that it is no cut-off minority. A group whose gateway was silent for that
long is taken by the next gateway that a member comes to; whether it may is settled by compare and set on the group's
progress. A gateway that could not say that it lives lets go of its groups before the others take them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from esperml.oona.jetstream.link import Message
from esperml.oona.log import LogUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.msg import Msg

    from esperml.oona.jetstream.groups import GroupKey, GroupStore
    from esperml.oona.jetstream.link import Link

_log = structlog.get_logger(__name__)

_BEATS: Final = 4
# Part of the lease after which a gateway that was not heard lets go: less than the others wait.
_LETS_GO_AFTER: Final = 0.75
_TRIES: Final = 20
_RETRY_S: Final = 0.05
_GOODBYE: Final = b"goodbye"
_ALIVE: Final = b"alive"
_TRACE_TTL: Final = "1m"


class Coordination:
    """Decides where the groups' members go. Somebody must await :meth:`run`.

    Args:
        link: the connection.
        store: the groups.
        root: subject below which gateways say that they live.
        gateway: this gateway.
        lease_s: time after which a gateway that is silent counts as gone, in s.
        let_go: called when this gateway must let go of all its groups.
    """

    def __init__(
        self, link: Link, store: GroupStore, root: str, gateway: str, lease_s: float, let_go: Callable[[], None]
    ) -> None:
        self._link = link
        self._store = store
        self._root = root
        self._gateway = gateway
        self._lease_s = lease_s
        self._let_go = let_go
        now_s = asyncio.get_running_loop().time()
        self._started_s = now_s
        self._confirmed_s = now_s
        self._heard_s: dict[str, float] = {}
        self._gone: set[str] = set()

    async def run(self) -> None:
        """Say that this gateway lives, until cancelled."""
        while True:
            await self.beat()
            await asyncio.sleep(self._lease_s / _BEATS)

    async def beat(self) -> None:
        """Say once that this gateway lives; let go of the groups where that has failed for too long."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        if began_s > self._confirmed_s + self._lease_s * _LETS_GO_AFTER:
            self._let_go()  # This process stood still.
        patience_s = max(self._confirmed_s + self._lease_s * _LETS_GO_AFTER - began_s, self._lease_s / _BEATS)
        try:
            async with asyncio.timeout(patience_s):
                await self._link.store(Message(f"{self._root}.{self._gateway}", _ALIVE, {"Nats-TTL": _TRACE_TTL}))
            self._confirmed_s = began_s
        except (LogUnavailableError, TimeoutError) as error:
            if loop.time() > self._confirmed_s + self._lease_s * _LETS_GO_AFTER:
                _log.warning("groups_let_go", detail=str(error) or "the cluster does not answer")
                self._let_go()

    async def say_goodbye(self) -> None:
        """Let the others have the groups at once."""
        await self._link.publish(f"{self._root}.{self._gateway}", _GOODBYE)

    async def heard(self, message: Msg) -> None:
        """Note that a gateway lives, or has gone."""
        gateway = message.subject.rpartition(".")[2]
        if message.data == _GOODBYE:
            self._gone.add(gateway)
        else:
            self._gone.discard(gateway)
            self._heard_s[gateway] = asyncio.get_running_loop().time()

    async def coordinator(self, key: GroupKey) -> str:
        """The gateway that coordinates a group: this one, where there was none.

        Raises:
            LogUnavailableError: that cannot be settled now.
        """
        loop = asyncio.get_running_loop()
        for _ in range(_TRIES):
            if loop.time() > self._confirmed_s + self._lease_s * _LETS_GO_AFTER:
                raise LogUnavailableError("this server is cut off from the cluster")
            record = self._store.records.get(key)
            present = "" if record is None else record.gateway
            if present == self._gateway or (present and self._lives(present)):
                return present
            await self._store.catch_up()
            record = self._store.records.get(key)
            if ("" if record is None else record.gateway) != present:
                continue
            if await self._store.claim(key):
                _log.info("group_taken", kind=key[0], group=key[1], before=present or None)
                return self._gateway
            await asyncio.sleep(_RETRY_S)
        raise LogUnavailableError(f"which server coordinates group {key[1]!r} is not settled yet")

    def _lives(self, gateway: str) -> bool:
        heard_s = self._heard_s.get(gateway, self._started_s)
        return gateway not in self._gone and asyncio.get_running_loop().time() <= heard_s + self._lease_s
