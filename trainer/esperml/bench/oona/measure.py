"""The whole measurement: systems in alternating blocks, cases, ratios."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from esperml.bench.oona.clients import LARGEST_FRAME
from esperml.bench.oona.figures import Estimate, estimate, percentiles_us
from esperml.bench.oona.lane import SYSTEMS, Lane, System, open_lane
from esperml.bench.oona.machine import facts, fdatasync_s
from esperml.bench.oona.servers import PeerAbsentError

COMPARED: Final = (256, 256)
"""Payload and frame of the case that the ratios compare."""

RATIOS: Final = {
    "ratio_redis_everysec": ("redis", "everysec"),
    "ratio_redis_always": ("redis", "always"),
    "ratio_jetstream": ("jetstream", "default"),
    "ratio_jetstream_always": ("jetstream", "always"),
    "ratio_floor": ("relay", "none"),
}
"""Key → the system and its mode below the line. Above it is the bus on SQLite, synced."""

ABOVE_THE_LINE: Final = ("oona-sqlite", "fsync")
SINGLE_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        payloads: sizes of an event, in bytes.
        frames: events in a published frame.
        rounds: blocks of each system in each case, besides the warm-up.
        block_s: about how long a block takes, in s; a warm-up finds out how many events that is.
        warm_up_events: events of the warm-up of each system in each case.
        singles: events that each system publishes one at a time, per round and payload.
        syncs: calls of fdatasync, per round.
    """

    payloads: Sequence[int] = (256, 4096)
    frames: Sequence[int] = (1, 32, 256)
    rounds: int = 7
    block_s: float = 1.0
    warm_up_events: int = 4096
    singles: int = 60
    syncs: int = 60


QUICK: Final = Plan(payloads=(256,), frames=(256,), rounds=3, block_s=0.3, singles=30, syncs=30)


@dataclass(slots=True)
class _Samples:
    """What the blocks of one lane gave.

    Attributes:
        events: (payload, frame) → events in a block.
        e2e_per_s: (payload, frame) → events a second, a block each.
        singles_s: payload → latencies, in s.
    """

    events: dict[tuple[int, int], int] = field(default_factory=dict)
    e2e_per_s: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    singles_s: dict[int, list[float]] = field(default_factory=dict)


def measure(
    plan: Plan,
    *,
    systems: Sequence[System] = SYSTEMS,
    folder: Path | None = None,
    advance: Callable[[str, int], None] = lambda _words, _total: None,
) -> dict[str, Any]:
    """Measure every system that is installed here, in blocks that alternate.

    Args:
        plan: how much.
        systems: which.
        folder: where the logs go, and whose disk is measured. None: a temporary one.
        advance: called before each step, with what it is, and how many steps there are in all.

    Returns:
        What ``esper bench oona --json`` prints; its help documents the keys.

    Raises:
        ProcessFailedError: a server or a client failed.
    """
    skipped: list[dict[str, str]] = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-", dir=folder)))
        lanes: dict[Lane, _Samples] = {}
        for index, system in enumerate(systems):
            place = root / f"{index}-{system.name}"
            place.mkdir()
            try:
                lanes[stack.enter_context(open_lane(system, place))] = _Samples()
            except PeerAbsentError as error:
                skipped.append({"system": system.name, "durability": system.durability, "reason": str(error)})
        syncs_s = _run(plan, lanes, root, advance)
        machine = facts(root)
    sync_p50, sync_p99 = percentiles_us(syncs_s)
    cases, ratios = _cases(plan, lanes), _ratios(lanes)
    return {
        "rounds": plan.rounds,
        "cases": cases,
        **ratios,
        "single_p99_over_floor": _single_over_floor(lanes, sync_p99),
        "fdatasync_p50_us": sync_p50,
        "fdatasync_p99_us": sync_p99,
        "systems": [
            {
                "system": lane.system.name,
                "durability": lane.system.durability,
                "client": lane.system.client,
                "server_threads": lane.system.threads,
            }
            for lane in lanes
        ],
        "skipped": _without_repetition(skipped),
        "machine": machine,
    }


def _run(plan: Plan, lanes: dict[Lane, _Samples], folder: Path, advance: Callable[[str, int], None]) -> list[float]:
    """Fill in the samples; returns how long each fdatasync took, in s."""
    syncs_s: list[float] = []
    total = len(lanes) * len(plan.payloads) * (plan.rounds * (len(plan.frames) + 1) + len(plan.frames))
    for payload in plan.payloads:
        for frame in plan.frames:
            case = (payload, frame)
            for lane, samples in lanes.items():
                advance(f"{_words(lane)}: warm-up, {payload} bytes in frames of {frame}", total)
                samples.events[case] = _block_events(lane, plan, payload, frame)
            for _ in range(plan.rounds):
                for lane, samples in lanes.items():
                    advance(f"{_words(lane)}: {payload} bytes in frames of {frame}", total)
                    rate = lane.events_per_s(payload, frame, samples.events[case])
                    samples.e2e_per_s.setdefault(case, []).append(rate)
        for _ in range(plan.rounds):
            syncs_s += fdatasync_s(folder, plan.syncs)
            for lane, samples in lanes.items():
                advance(f"{_words(lane)}: {payload} bytes, one at a time", total)
                latencies_s = lane.single_latencies_s(payload, plan.singles, SINGLE_PAUSE_S)
                samples.singles_s.setdefault(payload, []).extend(latencies_s)
    return syncs_s


def _block_events(lane: Lane, plan: Plan, payload: int, frame: int) -> int:
    """Warm a lane up; about how many events fill a block then, in whole frames of any size."""
    few = max(plan.warm_up_events // LARGEST_FRAME, 1) * LARGEST_FRAME
    rate = lane.events_per_s(payload, frame, few)
    # The first block pays for connections and caches: what comes after it is what counts.
    rate = max(rate, lane.events_per_s(payload, frame, few))
    return max(round(rate * plan.block_s / LARGEST_FRAME), 1) * LARGEST_FRAME


def _cases(plan: Plan, lanes: dict[Lane, _Samples]) -> list[dict[str, Any]]:
    """A row a system, mode, payload and frame; of several clients the fastest one's."""
    rows = []
    for system, durability in dict.fromkeys(_key(lane) for lane in lanes):
        for payload in plan.payloads:
            for frame in plan.frames:
                lane, samples = _fastest(lanes, (system, durability), (payload, frame))
                rate, interval = estimate(samples.e2e_per_s[payload, frame]).rounded(0)
                p50, p99 = percentiles_us(samples.singles_s[payload])
                rows.append(
                    {
                        "system": system,
                        "durability": durability,
                        "client": lane.system.client,
                        "payload": payload,
                        "frame": frame,
                        "e2e_per_s": rate,
                        "e2e_interval": interval,
                        "block_events": samples.events[payload, frame],
                        "single_p50_us": p50,
                        "single_p99_us": p99,
                    }
                )
    return rows


def _ratios(lanes: dict[Lane, _Samples]) -> dict[str, Any]:
    """Each ratio with its interval, from the blocks of the same round; None where a system is absent."""
    found: dict[str, Any] = {}
    keys = {_key(lane) for lane in lanes}
    measured = all(COMPARED in samples.e2e_per_s for samples in lanes.values())
    for name, below in RATIOS.items():
        found[name] = found[f"{name}_interval"] = None
        if measured and {ABOVE_THE_LINE, below} <= keys:
            ours, theirs = (_fastest(lanes, key, COMPARED)[1].e2e_per_s[COMPARED] for key in (ABOVE_THE_LINE, below))
            found[name], found[f"{name}_interval"] = _quotient(ours, theirs).rounded(2)
    return found


def _quotient(above: Iterable[float], below: Iterable[float]) -> Estimate:
    return estimate([a / b for a, b in zip(above, below, strict=True)])


def _single_over_floor(lanes: dict[Lane, _Samples], sync_p99_us: float) -> float | None:
    """p99 of a single event through the synced bus, over the relay's p99 and the disk's together."""
    p99 = {
        _key(lane): percentiles_us(samples.singles_s[COMPARED[0]])[1]
        for lane, samples in lanes.items()
        if COMPARED[0] in samples.singles_s
    }
    if ABOVE_THE_LINE not in p99 or RATIOS["ratio_floor"] not in p99:
        return None
    return round(p99[ABOVE_THE_LINE] / (p99[RATIOS["ratio_floor"]] + sync_p99_us), 2)


def _fastest(lanes: dict[Lane, _Samples], key: tuple[str, str], case: tuple[int, int]) -> tuple[Lane, _Samples]:
    found = [(lane, samples) for lane, samples in lanes.items() if _key(lane) == key]
    return max(found, key=lambda pair: median(pair[1].e2e_per_s[case]))


def _key(lane: Lane) -> tuple[str, str]:
    return lane.system.name, lane.system.durability


def _words(lane: Lane) -> str:
    return f"{lane.system.name} ({lane.system.durability}, {lane.system.client})"


def _without_repetition(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for index, row in enumerate(rows) if row not in rows[:index]]
