"""Who decides: trained policies and the plain ones that they are compared with, each under a name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo import checkpoint
from esperml.tamiyo.fast import FastPolicy
from esperml.tamiyo.features import FEATURE_VERSION, allowed_blueprints, tensors
from esperml.tamiyo.policy import PolicyNetwork
from esperml.tamiyo.view import StateView

CHANCE_PROBABILITY: Final = 0.5
EXPLORE_PROBABILITY: Final = 0.3


@dataclass(frozen=True, slots=True)
class Scores:
    """A policy's distribution over what may be done in one state with P places and B blueprints, after masks.

    Attributes:
        adapt: probability of adapting; 0 where nothing is allowed.
        places: probability of each place, given that something is done, ``[P]``; sums to one, or is all zero.
        blueprints: probability of each blueprint, given the place, ``[P, B]``; rows of masked places are zero.
        value: estimate of the state's worth in units of reward, or ``None``.
        features_s: time from message to tensors, in seconds.
        policy_s: time in the network, in seconds.
    """

    adapt: float
    places: NDArray[np.float64]
    blueprints: NDArray[np.float64]
    value: float | None
    features_s: float = 0.0
    policy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What is known of a policy.

    Attributes:
        name: under which runs ask for it.
        version: names exactly this policy.
        kind: what it is.
        vocabulary: blueprints that it knows, in its order; ``None`` where it takes any.
        always_draws: its probabilities are there to be drawn from; its most probable choice means nothing.
        parameters: number of its weights.
        trained_at: when it was trained, or ``None``.
        metrics: figures from its training.
        feature_version: of the features that it reads.
    """

    name: str
    version: str
    kind: str
    vocabulary: tuple[str, ...] | None = None
    always_draws: bool = False
    parameters: int = 0
    trained_at: datetime | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    feature_version: int = FEATURE_VERSION


class Policy(Protocol):
    """Something that judges states."""

    @property
    def facts(self) -> PolicyFacts:
        """What is known of it."""
        ...

    def judge(self, view: StateView, vocabulary: Sequence[str]) -> Scores:
        """The distribution over what the state's mask allows, blueprints in the order of ``vocabulary``."""
        ...


class GcnPolicy:
    """A trained policy network."""

    def __init__(
        self, name: str, network: PolicyNetwork, version: str, metadata: checkpoint.Metadata | None = None
    ) -> None:
        self.network = network.eval()
        self.facts = PolicyFacts(
            name=name,
            version=version,
            kind="gcn",
            vocabulary=network.config.vocabulary,
            parameters=sum(weights.numel() for weights in network.parameters()),
            trained_at=metadata.trained_at if metadata else None,
            metrics=dict(metadata.metrics) if metadata else {},
        )
        self._fast = FastPolicy(network)

    @classmethod
    def of(cls, name: str, loaded: checkpoint.Checkpoint) -> GcnPolicy:
        """The policy of a checkpoint."""
        return cls(name, loaded.network, loaded.version, loaded.metadata)

    def judge(self, view: StateView, vocabulary: Sequence[str]) -> Scores:
        """See :class:`Policy`."""
        started = time.perf_counter()
        host = tensors(view, vocabulary)
        extracted = time.perf_counter()
        judgement = self._fast(host)
        return Scores(
            adapt=judgement.adapt,
            places=judgement.places,
            blueprints=judgement.blueprints,
            value=judgement.value,
            features_s=extracted - started,
            policy_s=time.perf_counter() - extracted,
        )


class ChancePolicy:
    """Adapts with a fixed probability, and then takes any allowed pair of place and blueprint alike.

    With probability 0 it does nothing, and is the control; with 0.5 it is the masked chance that a trained policy has
    to beat; with 0.3 it gathers experience.
    """

    def __init__(self, name: str, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability: is {probability}, outside [0, 1]")
        self.probability = probability
        self.facts = PolicyFacts(name=name, version=f"p{probability:g}", kind="chance", always_draws=True)

    def judge(self, view: StateView, vocabulary: Sequence[str]) -> Scores:
        """See :class:`Policy`."""
        allowed = allowed_blueprints(view.state, vocabulary).astype(np.float64)
        choices = allowed.sum(axis=1, keepdims=True)
        total = choices.sum()
        return Scores(
            adapt=self.probability if total else 0.0,
            places=choices[:, 0] / max(total, 1.0),
            blueprints=allowed / np.maximum(choices, 1.0),
            value=None,
        )
