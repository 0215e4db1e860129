"""Splits clusters of runs into those trained on and those held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping


def split(
    clusters: Iterable[str], fraction: float, seed: int, known: Mapping[str, bool] | None = None
) -> dict[str, bool]:
    """Says of each cluster whether it is held out.

    Twins share a host, so that a split between them would let a policy be judged on hosts that it was trained on; hence
    whole clusters are held out. The draw depends on the names and the seed alone, not on the order.

    Args:
        clusters: names, repeats allowed.
        fraction: share of the clusters to hold out, 0 to below 1; at least one of two or more if above 0.
        seed: of the draw.
        known: clusters that were split before. They stay where they are.

    Returns:
        True for each cluster that is held out.
    """
    result = dict(known or {})
    new = sorted(set(clusters) - set(result), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = round(fraction * len(new))
    if fraction > 0 and len(new) > 1 and not any(result.values()):
        count = min(max(count, 1), len(new) - 1)
    return result | {name: position < count for position, name in enumerate(new)}
