"""What kind of layer a module is, told without importing the library that it comes from."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

from torch import nn

from esperml.kasmina.geometry import CONV_RANKS, LINEAR
from esperml.v1 import graph_pb2

LayerKind: TypeAlias = "graph_pb2.LayerType.ValueType"

GROWING: Final = frozenset({LINEAR, *CONV_RANKS})
"""Kinds of layers at which seeds may grow. The others can be observed."""

_TYPES: Final[tuple[tuple[tuple[type[nn.Module], ...], LayerKind], ...]] = (
    ((nn.Linear,), LINEAR),
    ((nn.Conv1d,), graph_pb2.LAYER_TYPE_CONV1D),
    ((nn.Conv2d,), graph_pb2.LAYER_TYPE_CONV2D),
    ((nn.Conv3d,), graph_pb2.LAYER_TYPE_CONV3D),
    ((nn.MultiheadAttention,), graph_pb2.LAYER_TYPE_ATTENTION),
    (
        (
            nn.modules.batchnorm._NormBase,
            nn.LayerNorm,
            nn.GroupNorm,
            nn.RMSNorm,
            nn.LocalResponseNorm,
            nn.CrossMapLRN2d,
        ),
        graph_pb2.LAYER_TYPE_NORMALISATION,
    ),
    ((nn.Embedding, nn.EmbeddingBag), graph_pb2.LAYER_TYPE_EMBEDDING),
    ((nn.RNNBase, nn.RNNCellBase), graph_pb2.LAYER_TYPE_RECURRENT),
)

_NORMALISATION_NAME: Final = re.compile(r"(Layer|RMS|Batch|Group|Instance)Norm")
_ATTENTION_NAME: Final = re.compile(r"Attention")
_CHANNELS_FIRST: Final = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_CONVOLUTIONS: Final = {rank: kind for kind, rank in CONV_RANKS.items()}


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The contract's name for the kind of ``module``, or ``None`` for what is no layer of a known kind.

    By type: Linear, Conv1d/2d/3d, MultiheadAttention, and torch's normalisations, embeddings and recurrent layers and
    cells. By form: the ``Conv1D`` of Hugging Face's transformers, which is a Linear layer whose weight lies the other
    way round. By name: modules without children that are called a LayerNorm, RMSNorm and so on; and the innermost
    modules that are called an attention and have Linear or convolution layers in them.
    """
    for types, kind in _TYPES:
        if isinstance(module, types):
            return kind
    if _is_transposed_linear(module):
        return LINEAR
    name = type(module).__name__
    inner = list(module.modules())[1:]
    if not inner and _NORMALISATION_NAME.search(name):
        return graph_pb2.LAYER_TYPE_NORMALISATION
    if _ATTENTION_NAME.search(name) and _holds_projections(inner):
        return graph_pb2.LAYER_TYPE_ATTENTION
    return None


def kind_name(kind: LayerKind) -> str:
    """The short name that people use: ``linear`` for ``LAYER_TYPE_LINEAR``."""
    return graph_pb2.LayerType.Name(kind).removeprefix("LAYER_TYPE_").lower()


def layout(kind: LayerKind, module: nn.Module, dimensions: int) -> LayerKind:
    """How entries lie in what a layer gives: as a convolution's, channels first, or as a Linear layer's, channels last.

    Args:
        kind: its kind.
        module: the layer.
        dimensions: of its output, the batch counted.
    """
    if kind in GROWING:
        return kind
    if isinstance(module, _CHANNELS_FIRST):
        return _CONVOLUTIONS.get(dimensions - 2, LINEAR)
    return LINEAR


def batch_axis(module: nn.Module, dimensions: int) -> int:
    """Which dimension of a layer's input and output counts the samples: 0, but for sequences that come time first."""
    time_first = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first
    return 1 if time_first and dimensions == 3 else 0


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is, or is derived from, ``transformers.pytorch_utils.Conv1D``: weight (in, out)."""
    if not any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return False
    weight, width = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.shape[1] == width


def _holds_projections(inner: list[nn.Module]) -> bool:
    kinds = [layer_kind(module) for module in inner]
    return graph_pb2.LAYER_TYPE_ATTENTION not in kinds and any(kind in GROWING for kind in kinds)
