"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esperml.kasmina.callbacks import Attached
from esperml.kasmina.errors import KasminaError
from esperml.kasmina.link import Link
from esperml.kasmina.session import Session

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("transformers is not installed: pip install 'esperml[transformers]'") from missing


class EsperCallback(TrainerCallback):
    """Connects what a Trainer trains. ::

        model = kasmina.wrap(model, example_input)
        callback = EsperCallback("localhost:50051", run="my-run", mode="act")
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])
        with callback:  # Without it the run is not told of an exception.
            trainer.train()
        print(callback.session.summary())

    The session steps after each optimizer step, before the Trainer sets gradients to zero. The loss that it is told is
    the ``loss`` of the model's outputs; where there is none it is absent. Evaluations and checkpoints do not count as
    training.

    Limits: a checkpoint of the Trainer's cannot be resumed from once something has grown: it has more parameters than
    the model that is made anew. FSDP and DeepSpeed are refused.

    Args:
        target: address of the server, or a link.
        settings: what :func:`~esperml.kasmina.connect` takes besides model, optimizer and scheduler.
    """

    def __init__(self, target: str | Link, **settings: Any) -> None:
        self._attached = Attached(target, **settings)
        self._normalised = False
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace)

    @property
    def session(self) -> Session | None:
        """The session; ``None`` before training starts."""
        return self._attached.session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Connect. Raises :class:`KasminaError`; see :func:`~esperml.kasmina.connect`."""
        if args.deepspeed:
            raise KasminaError("DeepSpeed has parameters and optimizer of its own, which nothing newborn can join")
        model, optimizer, scheduler = kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"]
        # Accelerate puts its own around both.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        scheduler = getattr(scheduler, "scheduler", scheduler)
        self._attached.start(model, optimizer, scheduler)
        self._handle = model.register_forward_hook(self._passed, with_kwargs=True)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step."""
        self._attached.step(epoch=int(state.epoch or 0), mean=not self._normalised)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What the Trainer does before the next step may be no part of training."""
        if control.should_evaluate or control.should_save:
            self._attached.pause()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training goes on."""
        self._attached.resume()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The run is completed."""
        self._end(None, None, None)

    def _passed(self, model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if model.training and isinstance(loss, Tensor):
            # Given that number, the model divides by it, and the losses of a step's passes add up to the step's.
            self._normalised = kwargs.get("num_items_in_batch") is not None
            self._attached.take_loss(loss)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._attached.end(kind, error, trace)
