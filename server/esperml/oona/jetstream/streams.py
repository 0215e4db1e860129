"""Makes the streams, and finds out what the cluster keeps its word with."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final

from esperml.contract import KINDS
from esperml.oona.jetstream.connecting import split_addresses, without_passwords
from esperml.oona.jetstream.link import RefusedError
from esperml.oona.jetstream.names import TopicNames
from esperml.oona.log import LogUnavailableError

if TYPE_CHECKING:
    from esperml.oona.jetstream.link import Link
    from esperml.settings import JetStreamSettings

_REPLICAS: Final = 3
_RETRY_S: Final = 0.25
_MONITOR_TIMEOUT_S: Final = 3.0

_NAME_IN_USE: Final = 10058
# Answers that a cluster gives while it is starting.
_NOT_YET: Final = frozenset({10005, 10008, 10009, 10023})

_WANTED: Final[dict[str, object]] = {
    "storage": "file",
    "retention": "limits",
    "discard": "old",
    "allow_direct": True,
    "allow_atomic": True,
    "allow_rollup_hdrs": True,
    "allow_msg_ttl": True,
}


async def create_streams(link: Link, settings: JetStreamSettings) -> int:
    """Make the streams that are missing. Returns how many servers hold each.

    Raises:
        LogUnavailableError: the cluster cannot, or did not in time.
    """
    replicas = settings.replicas or (_REPLICAS if link.clustered else 1)
    prefix = settings.prefix
    names = [TopicNames.of(prefix, kind) for kind in KINDS]
    wanted: list[dict[str, object]] = [
        {"name": name.stream, "subjects": [name.subjects], **_WANTED, "num_replicas": replicas} for name in names
    ]
    groups = {
        "name": f"{prefix}_GROUPS".upper(),
        "subjects": [f"{prefix}._group.>", f"{prefix}._gateway.*"],
        "max_msgs_per_subject": 1,
    }
    wanted.append({**groups, **_WANTED, "num_replicas": replicas})
    try:
        async with asyncio.timeout(settings.timeout_s):
            return min([await _create(link, config) for config in wanted])
    except TimeoutError as error:
        raise LogUnavailableError(f"the cluster did not make the streams within {settings.timeout_s:g} s") from error


async def _create(link: Link, config: dict[str, Any]) -> int:
    while True:
        try:
            answer = await link.api(f"STREAM.CREATE.{config['name']}", config)
        except RefusedError as error:
            if error.code == _NAME_IN_USE:
                # Made before, perhaps with other replicas or limits: those are the operator's to choose.
                answer = await link.api(f"STREAM.INFO.{config['name']}", {})
            elif error.code in _NOT_YET:
                await asyncio.sleep(_RETRY_S)
                continue
            else:
                raise
        except LogUnavailableError:
            await asyncio.sleep(_RETRY_S)
            continue
        present = answer["config"]
        for key in ("allow_direct", "allow_atomic", "allow_rollup_hdrs", "allow_msg_ttl"):
            if not present.get(key):
                raise LogUnavailableError(
                    f"stream {config['name']}: lacks {key}, which needs nats-server 2.12 or later"
                )
        replicas: int = present["num_replicas"]
        return replicas


async def declare_durability(settings: JetStreamSettings, replicas: int) -> str:
    """What is survived once something is stored, in words.

    Servers do not tell their clients whether they sync what they store before they confirm it; their monitoring
    addresses do.

    Raises:
        LogUnavailableError: a monitoring address does not answer.
    """
    copies = f"replicated×{replicas}" if replicas > 1 else "one server"
    addresses = split_addresses(settings.monitoring)
    if not addresses:
        return copies
    synced = await asyncio.gather(*(asyncio.to_thread(_sync_interval, address) for address in addresses))
    if all(interval == "always" for interval in synced):
        return f"{copies}, fsync"
    return f"{copies}, synced every {max(interval for interval in synced if interval != 'always')}"


def _sync_interval(address: str) -> str:
    """``always``, or the time between two syncs, of the server with a monitoring address."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/varz", timeout=_MONITOR_TIMEOUT_S) as response:  # noqa: S310
            config = json.load(response)["jetstream"]["config"]
    except (OSError, HTTPException, ValueError, KeyError) as error:
        # Of an address that cannot be read, the error would show all.
        why = error if isinstance(error, OSError) else "it must be like http://127.0.0.1:8222, of a nats-server"
        raise LogUnavailableError(
            f"oona.jetstream.monitoring: {without_passwords([address])} does not answer: {why}"
        ) from error
    if config.get("sync_always"):
        return "always"
    return f"{config.get('sync_interval', 0) / 1e9:g} s"
