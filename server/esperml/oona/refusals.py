"""The log of who was refused: each reason once for each caller in a while, however often it knocks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import structlog

from esperml.oona.access import Caller

_log = structlog.get_logger(__name__)

INTERVAL_S: Final = 60.0
"""Time within which the same refusal is logged once, in s."""

_MAX_KEPT: Final = 1024


class RefusalLog:
    """Logs refusals, and counts those that it leaves out.

    Args:
        clock: gives the time, in s.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # When each was logged, latest last, and how often it happened since.
        self._kept: OrderedDict[tuple[str, str, str], tuple[float, int]] = OrderedDict()

    def refused(self, detail: str, *, method: str, peer: str, caller: Caller | None, client_id: str = "") -> None:
        """Somebody was refused.

        Args:
            detail: why; never anything of the token itself.
            method: what was called.
            peer: where from, as gRPC says it: ``ipv4:192.0.2.1:50000``.
            caller: who, where that is known.
            client_id: what the client calls itself, where it said so.
        """
        host = peer.rpartition(":")[0] or peer
        name = "" if caller is None else caller.name
        # The field that was refused, where it is one: a caller that tries one run after the other is one line.
        key = (host, name, f"{method} {detail.partition(':')[0]}")
        now_s = self._clock()
        logged_s, left_out = self._kept.get(key, (-INTERVAL_S, 0))
        if now_s < logged_s + INTERVAL_S:
            self._kept[key] = (logged_s, left_out + 1)
            return
        self._kept[key] = (now_s, 0)
        self._kept.move_to_end(key)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        fields = {"client_id": client_id} if client_id else {}
        if left_out:
            fields["repeated"] = str(left_out)
        _log.warning("refused", method=method, peer=peer, token_name=name, detail=detail, **fields)
