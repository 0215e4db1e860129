"""Policies on disk: safetensors for the weights, JSON for all that must fit before they are used. No pickle.

A checkpoint is a folder with two files. ``policy.json`` names the format, the feature version and the features
themselves, the vocabulary, the sizes, the training's figures, and the digest of ``policy.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from esperml.tamiyo.features import FEATURE_VERSION, GRAPH_FEATURES, NODE_FEATURES, PLACE_FEATURES
from esperml.tamiyo.policy import PolicyConfig, PolicyNetwork

FORMAT_VERSION: Final = 1
WEIGHTS_FILE: Final = "policy.safetensors"
METADATA_FILE: Final = "policy.json"
VERSION_DIGITS: Final = 12


class CheckpointError(ValueError):
    """A checkpoint cannot be used.

    Attributes:
        path: the checkpoint's folder.
        problem: what does not fit.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"checkpoint {path}: {problem}")
        self.path = path
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known of a policy besides its weights.

    Attributes:
        trained_at: when training ended, with a time zone.
        metrics: figures from training and evaluation, by name.
        notes: anything else worth keeping: data sets, seeds, commands.
    """

    trained_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was loaded and fits.

    Attributes:
        network: in evaluation mode, on the CPU.
        version: digest that names exactly these weights and this description.
        metadata: what is known of it.
    """

    network: PolicyNetwork
    version: str
    metadata: Metadata


class _Description(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    feature_version: int
    node_features: tuple[str, ...]
    place_features: tuple[str, ...]
    graph_features: tuple[str, ...]
    vocabulary: tuple[str, ...]
    hidden: int = Field(ge=1, le=4096)
    layers: int = Field(ge=1, le=64)
    trained_at: AwareDatetime
    metrics: dict[str, float]
    notes: dict[str, str]
    weights_sha256: str


def save(path: Path, network: PolicyNetwork, metadata: Metadata | None = None) -> str:
    """Write a checkpoint.

    The description, which holds the digest of the weights, is moved into place last: a crash in between leaves a
    checkpoint that is refused, never one that mixes two policies.

    Args:
        path: folder to write; made where missing, overwritten where present.
        network: the policy.
        metadata: what to say of it; now, and no figures, where absent.

    Returns:
        The version.

    Raises:
        OSError: the folder cannot be written.
        CheckpointError: a weight is not finite.
    """
    metadata = metadata or Metadata()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    _check_finite(path, state)
    weights = save_tensors(state)
    description = _Description(
        format_version=FORMAT_VERSION,
        feature_version=FEATURE_VERSION,
        node_features=NODE_FEATURES,
        place_features=PLACE_FEATURES,
        graph_features=GRAPH_FEATURES,
        vocabulary=network.config.vocabulary,
        hidden=network.config.hidden,
        layers=network.config.layers,
        trained_at=metadata.trained_at,
        metrics=dict(metadata.metrics),
        notes=dict(metadata.notes),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = (json.dumps(description.model_dump(mode="json"), indent=2) + "\n").encode()
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / WEIGHTS_FILE, weights)
    _replace(path / METADATA_FILE, text)
    return _version(text)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check that it fits.

    Args:
        path: its folder.

    Raises:
        CheckpointError: it is not there, is damaged, or was made for other features, with what does not fit.
    """
    try:
        text = (path / METADATA_FILE).read_bytes()
        weights = (path / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}: {error.filename}") from error
    description = _parse(path, text)
    _check_features(path, description)
    if hashlib.sha256(weights).hexdigest() != description.weights_sha256:
        raise CheckpointError(path, f"{WEIGHTS_FILE} is damaged: its digest is not the one in {METADATA_FILE}")
    try:
        state = load_tensors(weights)
    except SafetensorError as error:
        raise CheckpointError(path, f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error
    try:
        config = PolicyConfig(description.vocabulary, hidden=description.hidden, layers=description.layers)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    network = PolicyNetwork(config)
    _check_tensors(path, network, state)
    _check_finite(path, state)
    network.load_state_dict(state)
    metadata = Metadata(description.trained_at, description.metrics, description.notes)
    return Checkpoint(network.eval(), _version(text), metadata)


def _parse(path: Path, text: bytes) -> _Description:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise CheckpointError(path, f"{METADATA_FILE} is not JSON: {error}") from error
    # Versions first: a checkpoint of another format may well have other fields.
    if isinstance(raw, dict):
        for name, expected in (("format_version", FORMAT_VERSION), ("feature_version", FEATURE_VERSION)):
            if name in raw and raw[name] != expected:
                raise CheckpointError(path, f"{name} is {raw[name]!r}, but this program has {expected}")
    try:
        return _Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise CheckpointError(path, f"{METADATA_FILE}: {where}: {first['msg']}") from error


def _check_features(path: Path, description: _Description) -> None:
    for name, expected in (
        ("node_features", NODE_FEATURES),
        ("place_features", PLACE_FEATURES),
        ("graph_features", GRAPH_FEATURES),
    ):
        given = getattr(description, name)
        if given != expected:
            odd = sorted(set(given) ^ set(expected))
            raise CheckpointError(path, f"{name} differ from this program's: {', '.join(odd[:5]) or 'their order'}")


def _check_tensors(path: Path, network: PolicyNetwork, state: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or surplus:
        names = [*(f"no tensor {name}" for name in missing[:5]), *(f"unknown tensor {name}" for name in surplus[:5])]
        raise CheckpointError(path, f"{WEIGHTS_FILE} has {', '.join(names)}")
    for name, tensor in state.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise CheckpointError(
                path,
                f"tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"but must be {wanted.dtype} of shape {list(wanted.shape)}",
            )


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(path, f"tensor {name} holds NaN or infinity")


def _version(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:VERSION_DIGITS]


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
