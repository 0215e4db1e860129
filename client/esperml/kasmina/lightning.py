"""A callback for Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from esperml.kasmina.callbacks import Attached
from esperml.kasmina.errors import KasminaError
from esperml.kasmina.link import Link
from esperml.kasmina.session import Session

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("Lightning is not installed: pip install 'esperml[lightning]'") from missing


class EsperCallback(Callback):
    """Connects what a Trainer fits. ::

        module.net = kasmina.wrap(module.net, example_input)  # Or the LightningModule itself.
        trainer = Trainer(callbacks=[EsperCallback("localhost:50051", run="my-run", mode="act")])
        trainer.fit(module)
        print(trainer.callbacks[0].session.summary())

    The session steps after each optimizer step, at the end of the batch: Lightning keeps the gradients until the next
    one. The loss that it is told is what ``training_step`` returned. Validation does not count as training.

    Limits: automatic optimization with one optimizer. A checkpoint of Lightning's cannot be resumed from once something
    has grown: it has more parameters than the model that is made anew.

    Args:
        target: address of the server, or a link.
        settings: what :func:`~esperml.kasmina.connect` takes besides model, optimizer and scheduler.
    """

    def __init__(self, target: str | Link, **settings: Any) -> None:
        self._attached = Attached(target, **settings)
        self._steps = 0

    @property
    def session(self) -> Session | None:
        """The session; ``None`` before training starts."""
        return self._attached.session

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect.

        Raises:
            KasminaError: see :func:`~esperml.kasmina.connect`; also for manual optimization, and several optimizers.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise KasminaError(
                "EsperCallback needs automatic optimization with one optimizer; call session.step yourself"
            )
        schedulers = trainer.lr_scheduler_configs
        self._steps = trainer.global_step
        self._attached.start(pl_module, trainer.optimizers[0], schedulers[0].scheduler if schedulers else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step where the optimizer has stepped."""
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._attached.take_loss(outputs["loss"])
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self._attached.step(epoch=trainer.current_epoch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no part of training."""
        self._attached.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        self._attached.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is completed."""
        self._attached.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has failed."""
        self._attached.end(type(exception), exception, exception.__traceback__)
