"""Results that are still on the device: gathered, moved to the host with one transfer, and handed out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Ledger:
    """Collects small tensors with what shall be done with their values."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._receivers: list[tuple[int, Callable[[list[float]], None]]] = []
        self._normed: list[Tensor] = []
        self._norm_receivers: list[tuple[int, Callable[[list[float]], None]]] = []

    def add(self, values: Tensor, receive: Callable[[list[float]], None]) -> None:
        """Hand the entries of ``values`` to ``receive`` at the settlement, finite or not."""
        flat = values.reshape(-1)
        self._tensors.append(flat)
        self._receivers.append((flat.shape[0], receive))

    def add_norms(self, tensors: Sequence[Tensor], receive: Callable[[list[float]], None]) -> None:
        """Hand the Euclidean norm of each of ``tensors`` to ``receive``; all norms are taken in one call."""
        self._normed.extend(tensors)
        self._norm_receivers.append((len(tensors), receive))

    def settle(self) -> None:
        """Move everything in one transfer and hand it out, in the order in which it came, norms last."""
        norms = torch._foreach_norm(self._normed) if self._normed else ()
        tensors = list(self._tensors)
        if norms and all(norm.dtype == norms[0].dtype and norm.device == norms[0].device for norm in norms):
            tensors.append(torch.stack(norms))
        else:
            tensors += [norm.reshape(1) for norm in norms]
        if not tensors:
            return
        first = tensors[0]
        if any(tensor.dtype != torch.float32 or tensor.device != first.device for tensor in tensors):
            tensors = [tensor.to(device=first.device, dtype=torch.float32) for tensor in tensors]
        values = torch.cat(tensors).tolist()
        at = 0
        for count, receive in [*self._receivers, *self._norm_receivers]:
            receive(values[at : at + count])
            at += count
