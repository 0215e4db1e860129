"""Small hosts of over thirty architectures, written out, and tiny random ones from Hugging Face's transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class DenseBlock(nn.Module):
    """Each layer reads all before it (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.grow = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.grow, strict=True):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    """Down, up again with a transposed convolution, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = functional.silu(self.enter(x))
        low = functional.silu(self.bottom(functional.silu(self.down(high))))
        return self.leave(torch.cat((high, self.up(low)), 1))


class Inception(nn.Module):
    """Branches of different reach, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3, padding=1))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 2, 1))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(torch.cat((self.one(x), self.three(x), self.pooled(x)), 1))).mean((2, 3))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, squeeze and excite, project, add (MobileNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.hardswish(self.norm(self.depthwise(functional.hardswish(self.expand(x)))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y * gate)


class PreActivationResNet(nn.Module):
    """Two residual blocks, the second with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
        self.n1, self.n2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a2(torch.relu(self.a1(torch.relu(self.n1(x)))))
        x = self.shortcut(x) + self.b2(torch.relu(self.n2(self.b1(x))))
        return self.head(x.mean((2, 3)))


class ConvNextBlock(nn.Module):
    """Depthwise convolution, then channels last, with a learned scale of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions with skips to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, 4, 1)
        self.filters = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(2))
        self.gates = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(2))
        self.skips = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))
        self.leave = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), torch.zeros(())
        for i, (make, gate, skip) in enumerate(zip(self.filters, self.gates, self.skips, strict=True)):
            padded = functional.pad(x, (2**i, 0))
            y = torch.tanh(make(padded)) * torch.sigmoid(gate(padded))
            total = total + skip(y)
            x = x + y
        return self.leave(torch.relu(total))


class Variational(nn.Module):
    """Two heads, a sample between them, a dataclass as output."""

    @dataclass
    class Output:
        image: Tensor
        mean: Tensor
        spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 8)
        self.mean, self.spread = nn.Linear(8, 3), nn.Linear(8, 3)
        self.decode = nn.Sequential(nn.Linear(3, 8), nn.ELU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> Output:
        hidden = functional.elu(self.encode(x))
        mean, spread = self.mean(hidden), self.spread(hidden)
        return self.Output(self.decode(mean + torch.randn_like(mean) * spread.exp()), mean, spread)


class Quantising(nn.Module):
    """A codebook between encoder and decoder, with the straight-through estimate (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 4)
        self.codes = nn.Embedding(6, 4)
        self.decode = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes.weight).argmin(1)
        return self.decode(z + (self.codes(nearest) - z).detach())


class Recurrent(nn.Module):
    """Words, a GRU, the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.memory = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.memory(self.words(tokens))[0][:, -1])


class TimeFirst(nn.Module):
    """A bidirectional LSTM of two layers, time first, read by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.memory = nn.LSTM(6, 4, num_layers=2, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.memory(torch.tanh(self.enter(x)))
        read, _ = self.attention(states[-1:], states, states)
        return self.head(read[0])


class CellLoop(nn.Module):
    """A cell that is unrolled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 4)
        self.cell = nn.LSTMCell(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(self.enter(x[:, step]), state)
        assert state is not None
        return self.head(state[0])


class EncoderDecoder(nn.Module):
    """torch's own transformer, with cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(source, target))


class Encoder(nn.Module):
    """torch's own encoder with normalisation first, on words with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.words(tokens) + self.positions).mean(1))


class CausalSelfAttention(nn.Module):
    """One projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.enter(x).chunk(3, 2))
        read = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.leave(read.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Words, one block, and the words' own weights again at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.attention = CausalSelfAttention()
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return self.head(x + self.down(functional.silu(self.gate(y)) * self.up(y)))


class Mixer(nn.Module):
    """Maps over positions and over features in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 4, stride=4)
        self.over_positions = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.over_features = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2)
        x = (x + self.over_positions(x)).transpose(1, 2)
        return self.head((x + self.over_features(x)).mean(1))


class Siamese(nn.Module):
    """One encoder for two inputs, an output of both and their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.compare = nn.Linear(8, 1)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a, b = self.encode(left), self.encode(right)
        return self.compare(torch.cat((a, b), 1)), {"distance": (a - b).norm(dim=1)}


class Experts(nn.Module):
    """Each sample goes to the expert that the router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.mish(self.enter(x))
        weight, chosen = self.router(x).softmax(1).max(1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return self.head(x + y)


class Conditioned(nn.Module):
    """A scale and a shift for each channel that a second input gives; None where it is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.condition = nn.Linear(3, 8)
        self.second = nn.Conv1d(4, 2, 3, padding=1)

    def forward(self, signal: Tensor, condition: Tensor | None = None) -> Tensor:
        y = self.first(signal)
        if condition is not None:
            scale, shift = self.condition(condition)[..., None].chunk(2, 1)
            y = y * (1 + scale) + shift
        return self.second(functional.leaky_relu(y))


class Hypernetwork(nn.Module):
    """The weights of one layer are the output of another."""

    def __init__(self) -> None:
        super().__init__()
        self.describe = nn.Linear(2, 4 * 6)
        self.enter, self.head = nn.Linear(5, 6), nn.Linear(4, 2)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        weight = self.describe(task).unflatten(1, (4, 6))
        return self.head(torch.relu(torch.einsum("bof,bf->bo", weight, torch.relu(self.enter(x)))))


class MessagePassing(nn.Module):
    """Two rounds over a dense graph, with the same update."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.message, self.update = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        h = torch.relu(self.enter(nodes))
        for _ in range(2):
            h = torch.relu(self.update(torch.cat((h, adjacency @ self.message(h)), -1)))
        return self.head(h.sum(1))


class Ode(nn.Module):
    """Euler steps of one field."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.field = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(3):
            x = x + 0.1 * self.field(x)
        return self.head(x)


class Parametrised(nn.Module):
    """Weights that are computed at each use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(6, 8))
        self.second = parametrizations.spectral_norm(nn.Linear(8, 8, bias=False))
        self.head = parametrizations.orthogonal(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.selu(self.second(functional.softplus(self.first(x)))))


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x))
        return self.head(x)


class FrozenBackbone(nn.Module):
    """A backbone that runs without gradients, and a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


class StopGradient(nn.Module):
    """A predictor that is held to a target branch, whose gradient is stopped; a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 5)
        self.predict = nn.Linear(5, 5)
        self.target = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"predicted": self.predict(torch.relu(self.encode(x))), "target": self.target(x).detach()}


class Force(nn.Module):
    """An energy, and its gradient by the input, which is part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        position = position.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.second(torch.tanh(self.first(position)))
            (force,) = torch.autograd.grad(energy.sum(), position, create_graph=torch.is_grad_enabled())
        return energy, -force


class InPlaceWriter(nn.Module):
    """Results are written into slices of one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        buffer = x.new_zeros(x.shape[0], 8)
        buffer[:, :3] = self.left(x)
        buffer[:, 3:] = self.right(x)
        return self.head(buffer.clamp_(min=0))


class Volume(nn.Module):
    """Three dimensions, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 3, 3), nn.Conv3d(3, 4, 2, bias=False)
        self.norm, self.head = nn.InstanceNorm3d(3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).amax((2, 3, 4)))


class Sets(nn.Module):
    """A sum over the members of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.member = nn.Sequential(nn.Linear(3, 6), nn.PReLU(), nn.Linear(6, 6))
        self.whole = nn.Sequential(nn.Linear(6, 6), nn.Hardtanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.member(x).sum(1))


class Bag(nn.Module):
    """Sparse features in a bag beside dense ones (a recommender), with factors of both."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4)
        self.dense = nn.Linear(3, 4)
        self.top = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, items: Tensor, numbers: Tensor) -> Tensor:
        a, b = self.bag(items), torch.relu(self.dense(numbers))
        return self.top(torch.cat((a, b, (a * b).sum(1, keepdim=True)), 1))


class Highway(nn.Module):
    """A gate that carries or transforms, and a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.transform, self.gate = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        gate = torch.sigmoid(self.gate(x))
        return self.head(gate * torch.relu(self.transform(x)) + (1 - gate) * x)


class Fourier(nn.Module):
    """Mixing in the frequency domain: complex numbers on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.after, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(5, 6, dtype=torch.cfloat) / math.sqrt(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        mixed = torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.weight, n=x.shape[1], dim=1)
        return self.head(functional.gelu(self.after(mixed) + x).mean(1))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


WRITTEN: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(5, 6),
    ),
    "dense_block": lambda: (DenseBlock(), torch.randn(3, 3, 6, 6)),
    "unet": lambda: (UNet(), torch.randn(2, 1, 8, 8)),
    "inception": lambda: (Inception(), torch.randn(2, 3, 6, 6)),
    "inverted_residual": lambda: (InvertedResidual(), torch.randn(3, 4, 6, 6)),
    "resnet": lambda: (PreActivationResNet(), torch.randn(2, 3, 6, 6)),
    "convnext": lambda: (ConvNextBlock(), torch.randn(2, 4, 7, 7)),
    "wavenet": lambda: (WaveNet(), torch.randn(2, 1, 12)),
    "variational": lambda: (Variational(), torch.randn(4, 12)),
    "quantising": lambda: (Quantising(), torch.randn(4, 12)),
    "gru": lambda: (Recurrent(), _tokens(3, 5)),
    "time_first": lambda: (TimeFirst(), torch.randn(5, 3, 3)),
    "cell_loop": lambda: (CellLoop(), torch.randn(3, 4, 3)),
    "encoder_decoder": lambda: (EncoderDecoder(), (torch.randn(2, 4, 8), torch.randn(2, 3, 8))),
    "encoder": lambda: (Encoder(), _tokens(3, 5)),
    "decoder": lambda: (Decoder(), _tokens(3, 5)),
    "mixer": lambda: (Mixer(), torch.randn(3, 1, 8, 8)),
    "siamese": lambda: (Siamese(), (torch.randn(3, 6), torch.randn(3, 6))),
    "experts": lambda: (Experts(), torch.randn(9, 6)),
    "conditioned": lambda: (Conditioned(), {"signal": torch.randn(3, 2, 9), "condition": torch.randn(3, 3)}),
    "hypernetwork": lambda: (Hypernetwork(), (torch.randn(3, 2), torch.randn(3, 5))),
    "message_passing": lambda: (MessagePassing(), (torch.randn(2, 4, 3), torch.rand(2, 4, 4))),
    "ode": lambda: (Ode(), torch.randn(3, 4)),
    "parametrised": lambda: (Parametrised(), torch.randn(4, 6)),
    "checkpointed": lambda: (Checkpointed(reentrant=False), torch.randn(4, 6)),
    "checkpointed_reentrant": lambda: (Checkpointed(reentrant=True), torch.randn(4, 6)),
    "frozen_backbone": lambda: (FrozenBackbone(), torch.randn(3, 1, 8, 8)),
    "stop_gradient": lambda: (StopGradient(), torch.randn(4, 6)),
    "force": lambda: (Force(), torch.randn(4, 3)),
    "in_place": lambda: (InPlaceWriter(), torch.randn(4, 4)),
    "volume": lambda: (Volume(), torch.randn(2, 1, 5, 5, 5)),
    "sets": lambda: (Sets(), torch.randn(3, 4, 3)),
    "bag": lambda: (Bag(), (_tokens(3, 4) % 9, torch.randn(3, 3))),
    "highway": lambda: (Highway(), torch.randn(3, 5)),
    "fourier": lambda: (Fourier(), torch.randn(3, 8, 3)),
}
"""Hosts that are written out here: each makes a model and its example input."""


def _bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
    )
    return BertForSequenceClassification(config), {"input_ids": _tokens(2, 5), "attention_mask": torch.ones(2, 5)}


def _gpt2() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), {"input_ids": _tokens(2, 5), "use_cache": False}


def _t5() -> tuple[nn.Module, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": _tokens(2, 4), "labels": _tokens(2, 3)}


def _llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    return LlamaForCausalLM(config), {"input_ids": _tokens(2, 5)}


def _vit() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return ViTForImageClassification(config), torch.randn(2, 1, 8, 8)


def _resnet() -> tuple[nn.Module, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config), torch.randn(3, 1, 16, 16)


def _wav2vec2() -> tuple[nn.Module, Any]:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        conv_dim=[4, 4],
        conv_stride=[4, 2],
        conv_kernel=[8, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    return Wav2Vec2Model(config), torch.randn(2, 100)


def _clip() -> tuple[nn.Module, Any]:
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    text = {**layers, "vocab_size": 11, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**layers, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    return CLIPModel(config), {"input_ids": _tokens(2, 5), "pixel_values": torch.randn(2, 3, 8, 8)}


def _mixtral() -> tuple[nn.Module, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=8,
    )
    return MixtralForCausalLM(config), {"input_ids": _tokens(2, 5), "use_cache": False}


def _convnext() -> tuple[nn.Module, Any]:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(num_channels=1, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
    return ConvNextModel(config), torch.randn(2, 1, 16, 16)


PRETRAINED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "t5": _t5,
    "llama": _llama,
    "vit": _vit,
    "hf_resnet": _resnet,
    "wav2vec2": _wav2vec2,
    "clip": _clip,
    "mixtral": _mixtral,
    "hf_convnext": _convnext,
}
"""Architectures from transformers with random weights."""
