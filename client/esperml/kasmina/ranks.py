"""The processes that train one model together: what they tell each other, and the gradients of what is newborn."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from esperml.kasmina.errors import KasminaError
from esperml.kasmina.host import Host

LEADER: Final = 0


class Ranks:
    """The processes of one group, each of them a rank; rank 0 leads.

    What is said here goes over a group of its own, on the processor: it gets in nobody's way, and waits for no device.
    Each method must be called by all of them, in the same order.

    Args:
        group: their group; ``None`` for all processes.

    Attributes:
        group: the same, which also carries gradients.
        rank: which of them this process is.
        size: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        members = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self._leader = members[LEADER]
        self._words = dist.new_group(members, backend="gloo", use_local_synchronization=True)

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return self.rank == LEADER

    def check_same(self, what: str, mine: bytes) -> None:
        """Raise :class:`KasminaError`, on all of them, where ``mine`` is not the same everywhere."""
        all_of_them = self.gather(mine)
        others = [rank for rank, theirs in enumerate(all_of_them) if theirs != all_of_them[LEADER]]
        if others:
            raise KasminaError(f"{what} differs between the ranks: rank {others[0]} has another one than rank {LEADER}")

    def gather(self, mine: object) -> list[Any]:
        """What each of them has to say, by rank."""
        all_of_them: list[Any] = [None] * self.size
        dist.all_gather_object(all_of_them, mine, group=self._words)
        return all_of_them

    def any_of(self, *mine: bool) -> tuple[bool, ...]:
        """For each of these, whether it is so anywhere."""
        flags = torch.tensor(mine, dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._words)
        return tuple(flag > 0 for flag in flags.tolist())

    def hear(self, said: object) -> Any:
        """What rank 0 says; what others say is not heard."""
        message = [said]
        dist.broadcast_object_list(message, self._leader, group=self._words)
        return message[0]


class NewbornGradients:
    """Averages the gradients of seeds over the ranks, at the end of each backward pass.

    DistributedDataParallel averages those of the parameters that it saw when the model was put under it. It need not
    know of others: their average is due before anything looks at gradients (clipping, a gradient scaler), and so at the
    end of the backward pass. All of them go in one piece, whether a rank's pass made use of them or not, so that none
    waits for one that has nothing to say. What was averaged in an earlier pass of the same step comes out the same when
    it is averaged again with what was added since.

    Args:
        host: the wrapped model's host.
        ranks: who takes part.
    """

    def __init__(self, host: Host, ranks: Ranks) -> None:
        self._host = host
        self._ranks = ranks
        self._handles: list[RemovableHandle] = []
        self._due = False

    def attend(self) -> None:
        """Average from now on if the host has seeds, and not if it has none."""
        self._due = False  # A pass that was broken off has left it set.
        if self._host.seeds and not self._handles:
            seeds = {id(parameter) for parameter in self._newborn()}
            self._handles += [
                parameter.register_post_accumulate_grad_hook(self._begun)  # type: ignore[no-untyped-call]
                for parameter in self._host.model.parameters()
                if parameter.requires_grad and id(parameter) not in seeds
            ]
        elif not self._host.seeds:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _begun(self, _parameter: Tensor) -> None:
        if not self._due:
            self._due = True
            Variable._execution_engine.queue_callback(self._average)

    def _newborn(self) -> list[nn.Parameter]:
        return [p for seed in self._host.seeds.values() for p in seed.body.parameters() if p.requires_grad]

    @torch.no_grad()
    def _average(self) -> None:
        self._due = False
        if not dist.is_initialized():
            return  # Training together is over, and the model is trained on alone.
        alike: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter in self._newborn():
            alike[parameter.device, parameter.dtype].append(parameter)
        for parameters in alike.values():
            self._average_alike(parameters)

    def _average_alike(self, parameters: list[nn.Parameter]) -> None:
        """One reduction: the gradients, and for each of them on how many ranks there was one."""
        there = [float(parameter.grad is not None) for parameter in parameters]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        flat = torch.cat([*parts, parts[0].new_tensor(there)])
        flat /= self._ranks.size
        dist.all_reduce(flat, group=self._ranks.group)
        *averages, anywhere = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
        for parameter, average, own, found in zip(parameters, averages, there, anywhere, strict=True):
            if own and parameter.grad is not None:
                parameter.grad.copy_(average.view_as(parameter))
            elif found > 0:  # Asks the device, where a seed took no part here.
                parameter.grad = average.view_as(parameter).clone()


def ranks_of(host: Host, distributed: bool | dist.ProcessGroup | None) -> Ranks | None:
    """The processes that train ``host`` together; ``None`` where this one trains it alone.

    Args:
        host: the wrapped model's host.
        distributed: whether there are others, or their group; ``None``: where ``torch.distributed`` is initialised.

    Raises:
        KasminaError: ``torch.distributed`` is not initialised, or parameters are sharded.
    """
    running = dist.is_available() and dist.is_initialized()
    if distributed and not running:
        raise KasminaError("torch.distributed is not initialised; call init_process_group before connect")
    if running:
        _check_whole(host.model)
    group = distributed if isinstance(distributed, dist.ProcessGroup) else None
    if distributed is False or not running or dist.get_world_size(group) == 1:
        return None
    return Ranks(group)


def _check_whole(model: nn.Module) -> None:
    """Raise :class:`KasminaError` where a process has only its shard of a parameter."""
    for name, parameter in model.named_parameters():
        # Those of FSDP2 and of tensor parallelism; and the flat ones into which FSDP1 lays all of a module.
        if hasattr(parameter, "device_mesh") or getattr(parameter, "_is_flat_param", False):
            raise KasminaError(
                f"parameter {name!r} is sharded (FSDP or tensor parallelism): what rank 0 asks of it alone would make "
                "it wait for the others for ever. Use DistributedDataParallel, or leave this model without a session"
            )
