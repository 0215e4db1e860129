"""Training from start to end: recordings in, checkpoints and metrics out.

The folder that is trained into holds

* the best policy so far, ready to be served: the one that surely gains most on held-out hosts;
* ``latest/``: the policy as it is, with everything that resuming needs;
* ``replay.sqlite``: the replay buffer;
* ``metrics.jsonl``: one line an evaluation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import structlog
import torch

from esperml.tamiyo import checkpoint
from esperml.tamiyo.policy import PolicyConfig, PolicyNetwork
from esperml.trainer import snapshots
from esperml.trainer.algorithm import AdvantageWeightedActorCritic, AdvantageWeightedConfig
from esperml.trainer.batches import Batch, returns_of
from esperml.trainer.dataset import Dataset
from esperml.trainer.evaluation import evaluate, held_out_losses, selection_score
from esperml.trainer.replay import ReplayBuffer, Step
from esperml.trainer.returns import Returns
from esperml.trainer.sampling import GroupSampler
from esperml.trainer.snapshots import TrainingState
from esperml.trainer.splitting import split

_log = structlog.get_logger(__name__)

REPLAY, METRICS, LATEST = "replay.sqlite", "metrics.jsonl", "latest"


ENOUGH: Final = 1000
"""Experiences below which what is learnt hardly carries over to other hosts."""


class TrainingError(Exception):
    """Training cannot start or go on."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train.

    Attributes:
        algorithm: hyperparameters of the algorithm.
        steps: updates in all, those before a resume included.
        hidden: units of the policy's hidden layers.
        layers: the policy's rounds of message passing.
        capacity: most experiences that the replay buffer keeps.
        validation_fraction: share of the clusters that are held out.
        evaluate_every: updates between two evaluations, each of which saves.
        patience: evaluations without a better one after which training stops; None never stops early.
        seed: of the network's weights, of the split and of the mini-batches.
    """

    algorithm: AdvantageWeightedConfig = field(default_factory=AdvantageWeightedConfig)
    steps: int = 2000
    hidden: int = 96
    layers: int = 3
    capacity: int = 100_000
    validation_fraction: float = 0.2
    evaluate_every: int = 50
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "hidden", "layers", "capacity", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, must be from 0 to below 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}, must be at least 1")

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        """The settings that ``dataclasses.asdict`` took.

        Raises:
            TypeError: a setting is not known.
            ValueError: a setting is out of range.
        """
        return cls(**{**facts, "algorithm": AdvantageWeightedConfig(**facts["algorithm"])})


class Training:
    """A training, new or resumed. Close it, or use it as a context manager.

    Args:
        folder: where to train into.
        settings: how to train.
        dataset: what to learn from; None when the replay buffer of a resumed training is enough.
        device: where to compute.
        resume: go on where ``folder`` stands, exactly so if neither settings nor experience changed.

    Raises:
        TrainingError: there is nothing to learn from, or the folder holds a training and ``resume`` is False.
        SnapshotError: there is no training to resume, or its state is broken.
        ReplayError: the replay buffer cannot be opened, or does not fit.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainingSettings,
        dataset: Dataset | None,
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.device = torch.device(device)
        latest = folder / LATEST
        snapshots.recover_folder(latest)
        if not resume and latest.exists():
            raise TrainingError(f"{folder}: holds a training already; resume it, or train into another folder")
        self.state = snapshots.load(latest) if resume else TrainingState()
        torch.manual_seed(settings.seed)
        network = checkpoint.load(latest).network if resume else self._new_network(dataset)
        self.algorithm = AdvantageWeightedActorCritic(network.to(self.device), settings.algorithm)
        folder.mkdir(parents=True, exist_ok=True)
        self.replay = ReplayBuffer(settings.capacity, network.config.vocabulary, folder / REPLAY)
        try:
            self._take_in(dataset, resume=resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the replay buffer."""
        self.replay.close()

    @property
    def network(self) -> PolicyNetwork:
        """The policy that is being trained."""
        return self.algorithm.network

    def shortcomings(self) -> list[str]:
        """What the experience is too little for, in sentences; empty where there is enough of it."""
        count = len({step.cluster for step in self._train})
        hosts = "1 host" if count == 1 else f"{count} hosts"
        found = []
        if len(self._train) < ENOUGH:
            found.append(
                f"there are only {len(self._train)} experiences of {hosts} to learn from, and fewer than {ENOUGH:,} "
                f"hardly teach what holds for other hosts"
            )
        if not self._validation:
            found.append("no host is held out, so that nothing will show whether the policy is any good")
        return found

    def run(self, on_step: Callable[[int, Mapping[str, float]], None] | None = None) -> dict[str, float]:
        """Trains to the end.

        Args:
            on_step: called after each update with the updates done and the losses.

        Returns:
            The metrics of the last evaluation.
        """
        metrics: dict[str, float] = {}
        if self.state.step >= self.settings.steps:
            metrics = self._evaluate()
        while self.state.step < self.settings.steps:
            if self.state.step % self.settings.algorithm.refresh_steps == 0:
                self._refresh()
            indices = self._sampler.sample()
            batch = Batch.of(
                [self._train[index] for index in indices],
                Returns(self.state.targets[indices], self.state.returns[indices]),
                advantage_scale=self.state.advantage_scale,
                device=self.device,
            )
            losses = self.algorithm.update(batch)
            self.state.step += 1
            if on_step is not None:
                on_step(self.state.step, losses)
            if self.state.step % self.settings.evaluate_every == 0 or self.state.step == self.settings.steps:
                metrics = self._evaluate_and_save(losses)
                if self.settings.patience is not None and self.state.stale >= self.settings.patience:
                    _log.info("training_stopped_early", step=self.state.step, best_step=self.state.best_step)
                    break
        return metrics

    def _new_network(self, dataset: Dataset | None) -> PolicyNetwork:
        if dataset is None or not dataset.transitions:
            why = dataset.summary.sentence() if dataset is not None else "no recording was given"
            raise TrainingError(f"there is nothing to learn from: {why}")
        names = {name for item in dataset.transitions for name in item.experience.state.graph.blueprints}
        network = PolicyNetwork(
            PolicyConfig(vocabulary=tuple(sorted(names)), hidden=self.settings.hidden, layers=self.settings.layers)
        )
        # A critic that starts anywhere else would spoil the first returns and advantages.
        for parameter in list(network.value.parameters())[-2:]:
            torch.nn.init.zeros_(parameter)
        return network

    def _take_in(self, dataset: Dataset | None, *, resume: bool) -> None:
        """Fills the replay buffer, splits it, and picks up what a resumed training had."""
        if dataset is not None:
            self.replay.add(dataset.transitions)
        steps = self.replay.steps()
        self.state.held_out = split(
            (step.cluster for step in steps), self.settings.validation_fraction, self.settings.seed, self.state.held_out
        )
        self._train = [step for step in steps if not self.state.held_out[step.cluster]]
        self._validation = [step for step in steps if self.state.held_out[step.cluster]]
        if not self._train:
            raise TrainingError("there is nothing to learn from: every cluster of runs is held out")
        self._sampler = GroupSampler(_groups(self._train), self.settings.algorithm.batch_size, seed=self.settings.seed)
        self.state.settings = asdict(self.settings)
        digest = _digest(self._train)
        if not resume:
            self.state.digest = digest
            return
        self._sampler.restore(self.state.sampler)
        snapshots.restore_optimizer(self.algorithm.optimizer, self.state.optimizer)
        torch.set_rng_state(self.state.random)
        _cut_metrics(self.folder / METRICS, self.state.step)
        if self.state.digest != digest:
            # Returns of other steps are of no use, and a best score on other hosts does not compare.
            _log.info("experience_changed", steps=len(self._train))
            self.state = replace(self.state, digest=digest, best=None, best_step=None, stale=0)
            self._refresh()

    def _refresh(self) -> None:
        """Computes the returns anew with the critic as it is."""
        config = self.settings.algorithm
        returns, held = returns_of(
            self.network,
            self._train,
            gamma=config.gamma,
            lambda_=config.lambda_,
            corrected=True,
            device=self.device,
        )
        self.state.targets, self.state.returns = returns.targets, returns.returns
        scale = float((returns.returns - held.values).std())
        self.state.advantage_scale = max(scale, float(np.finfo(np.float32).eps))

    def _evaluate(self) -> dict[str, float]:
        if not self._validation:
            return {}
        return {
            **held_out_losses(
                self.algorithm, self._validation, advantage_scale=self.state.advantage_scale, device=self.device
            ),
            **evaluate(self.network, self._validation, gamma=self.settings.algorithm.gamma, device=self.device),
        }

    def _evaluate_and_save(self, losses: Mapping[str, float]) -> dict[str, float]:
        metrics = self._evaluate()
        state = self.state
        score = selection_score(metrics)
        if score is None or state.best is None or score > state.best:
            state.best, state.best_step, state.stale = score, state.step, 0
        else:
            state.stale += 1
        state.sampler = self._sampler.state()
        state.random = torch.get_rng_state()
        state.optimizer = snapshots.optimizer_tensors(self.algorithm.optimizer)
        with (self.folder / METRICS).open("a") as file:
            line = {"step": state.step, "training": dict(losses), "validation": metrics}
            file.write(json.dumps(line) + "\n")
        self._save(metrics)
        return metrics

    def _save(self, metrics: Mapping[str, float]) -> None:
        latest = self.folder / LATEST
        new = latest.with_name(latest.name + ".new")
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        metadata = self._metadata(metrics)
        checkpoint.save(new, self.network, metadata)
        snapshots.save(new, self.state)
        snapshots.replace_folder(new, latest)
        if self.state.stale == 0:
            checkpoint.save(self.folder, self.network, metadata)

    def _metadata(self, metrics: Mapping[str, float]) -> checkpoint.Metadata:
        return checkpoint.Metadata(
            metrics=dict(metrics),
            notes={
                "step": str(self.state.step),
                "experiences": str(len(self._train)),
                "experiences_held_out": str(len(self._validation)),
                "settings": json.dumps(asdict(self.settings)),
            },
        )


def _groups(steps: Sequence[Step]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        groups.setdefault(step.host, []).append(index)
    return list(groups.values())


def _digest(steps: Sequence[Step]) -> str:
    """A name for this set of steps in this order."""
    digest = hashlib.sha256()
    for step in steps:
        digest.update(json.dumps([step.episode, step.position]).encode())
    return digest.hexdigest()


def _cut_metrics(path: Path, step: int) -> None:
    """Drops the lines of updates that a resumed training does again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("metrics_line_dropped", path=str(path), error=str(error))
    path.write_text("".join(f"{line}\n" for line in kept))
