"""What the callbacks of training frameworks have in common."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esperml.kasmina.connecting import connect
from esperml.kasmina.errors import KasminaError
from esperml.kasmina.host import Host, host_of
from esperml.kasmina.link import Link
from esperml.kasmina.session import Session


class Attached:
    """A session that a framework's trainer drives.

    Args:
        target: address of the server, or a link.
        settings: what :func:`~esperml.kasmina.connect` takes besides model, optimizer and scheduler.

    Attributes:
        session: the session; ``None`` before training starts. It stays when training has ended, for its summary.
    """

    def __init__(self, target: str | Link, **settings: Any) -> None:
        self.session: Session | None = None
        self._target = target
        self._settings = settings
        self._pause = ExitStack()
        self._losses: list[Tensor] = []

    def start(self, model: nn.Module, optimizer: Optimizer, scheduler: object | None) -> None:
        """Training starts.

        Raises:
            KasminaError: see :func:`~esperml.kasmina.connect`; also where ``model`` has no wrapped module in it, or
                more than one.
        """
        host = host_within(model)
        self._losses.clear()
        self.session = connect(self._target, host.model, optimizer, scheduler=scheduler, **self._settings)

    def take_loss(self, loss: Tensor) -> None:
        """Note a part of the step's training loss. Nothing waits for its device."""
        self._losses.append(loss.detach())

    def step(self, *, epoch: int, mean: bool = False) -> None:
        """An optimizer step is done, and its gradients are still there.

        Args:
            epoch: the epoch, from 0.
            mean: whether the parts of the loss are averaged, and not added up.
        """
        loss: Tensor | None = None
        if self._losses:
            loss = sum(self._losses[1:], start=self._losses[0])
            loss = loss / len(self._losses) if mean else loss
        self._losses.clear()
        if self.session is not None:
            self.session.step(loss=loss, epoch=epoch)

    def pause(self) -> None:
        """What follows is no part of training, until :meth:`resume`."""
        self.resume()
        if self.session is not None:
            self._pause.enter_context(self.session.untimed())

    def resume(self) -> None:
        """Training goes on."""
        self._pause.close()

    def end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Training has ended, by an error perhaps."""
        self.resume()
        self._losses.clear()
        if self.session is not None:
            self.session.__exit__(kind, error, trace)


def host_within(model: nn.Module) -> Host:
    """The host of the one wrapped module in ``model``. Raises :class:`KasminaError` where there is not just one."""
    found: dict[int, Host] = {}
    for module in model.modules():
        try:
            host = host_of(module)
        except KasminaError:
            continue
        found[id(host)] = host
    if len(found) != 1:
        raise KasminaError(
            f"the model has {len(found)} wrapped modules in it, and must have one: kasmina.wrap makes it"
        )
    return next(iter(found.values()))
