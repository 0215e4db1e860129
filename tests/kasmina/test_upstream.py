"""A seed that spans two layers reads what belongs to the same invocation, or is left out."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from esperml import kasmina
from esperml.kasmina import upstream


class Block(nn.Module):
    """Two layers, with what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Host(nn.Module):
    """A block, called as ``how`` says."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if self.how in {"reentrant", "not reentrant"}:
            return self.head(checkpoint(block, x, use_reentrant=self.how == "reentrant"))
        if self.how in {"parts together, reentrant", "parts together, not reentrant"}:
            both = checkpoint(
                lambda x: block.second(torch.tanh(block.first(x))),
                x,
                use_reentrant=self.how == "parts together, reentrant",
            )
            return self.head(both)
        if self.how in {"parts apart, reentrant", "parts apart, not reentrant"}:
            reentrant = self.how == "parts apart, reentrant"
            hidden = checkpoint(lambda x: torch.tanh(block.first(x)), x, use_reentrant=reentrant)
            return self.head(checkpoint(block.second, hidden, use_reentrant=reentrant))
        if self.how == "one part, reentrant":
            return self.head(block.second(checkpoint(lambda x: torch.tanh(block.first(x)), x, use_reentrant=True)))
        if self.how == "in place":
            x = x * 1
            hidden = torch.tanh(block.first(x))
            x.mul_(2)
            return self.head(block.second(hidden) + x)
        return self.head(block(x))


class Reference(nn.Module):
    """The same with the seed written out."""

    def __init__(self, host: Host, body: nn.Module | None) -> None:
        super().__init__()
        self.host = host
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        block = self.host.block
        out = block.second(torch.tanh(block.first(x)))
        if self.body is not None:
            out = out + self.body.up(self.body.down(x))
        return self.host.head(out)


def grown(how: str = "plain") -> tuple[Host, kasmina.Seed]:
    """A wrapped host with a low-rank seed over the block that is not silent any more."""
    torch.manual_seed(3)
    host = Host()
    kasmina.wrap(host, torch.randn(4, 6))
    host.how = how
    grafter = kasmina.Grafter(kasmina.host_of(host), None)
    seed = grafter.germinate("low_rank", "block.first", "block.second", 36, seed_id="s")
    nn.init.normal_(seed.body.up.weight)
    return host, seed


def reference(host: Host, seed: kasmina.Seed | None) -> Reference:
    body = None if seed is None else copy.deepcopy(seed.body)
    plain = Host()
    plain.load_state_dict({name: value for name, value in host.state_dict().items() if "kasmina_seeds" not in name})
    return Reference(plain, body)


def gradients(host: Host, seed: kasmina.Seed) -> list[Tensor]:
    own = [p.grad for name, p in host.named_parameters() if "kasmina_seeds" not in name]
    return own + [p.grad for p in seed.body.parameters()]


def expected_gradients(plain: Reference) -> list[Tensor]:
    seeds = [] if plain.body is None else [p.grad for p in plain.body.parameters()]
    return [p.grad for p in plain.host.parameters()] + seeds


def inputs(count: int, *, requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=generator).requires_grad_(requires_grad) for _ in range(count)]


def check(host: Host, seed: kasmina.Seed, plain: Reference, passes: int = 1) -> None:
    """Outputs and gradients of ``passes`` forward passes before one backward are those of the reference."""
    given, same = inputs(passes), inputs(passes)
    got = [host(x) for x in given]
    wanted = [plain(x) for x in same]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    sum(out.square().sum() for out in got).backward()
    sum(out.square().sum() for out in wanted).backward()
    for one, other in zip(gradients(host, seed), expected_gradients(plain), strict=False):
        torch.testing.assert_close(one, other)
    for one, other in zip(given, same, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


WHOLE = ("plain", "reentrant", "not reentrant", "parts together, reentrant", "parts together, not reentrant")
CUT = ("parts apart, reentrant", "parts apart, not reentrant", "one part, reentrant")


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("how", WHOLE)
def test_gradients_are_those_of_a_model_with_the_seed_written_out(how, passes):
    host, seed = grown(how)
    for _ in range(2):
        host.zero_grad()
        check(host, seed, reference(host, seed), passes)
    assert seed.errors == 0, seed.last_error


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("how", CUT)
def test_a_span_that_a_checkpoint_cuts_is_left_out_there_with_the_reason(how, passes):
    host, seed = grown(how)
    check(host, seed, reference(host, None), passes)
    assert seed.errors >= passes
    assert seed.last_error == upstream.CHECKPOINTED
    host.how = "plain"
    host.zero_grad()
    check(host, seed, reference(host, seed), passes)


def test_whole_segments_of_a_sequence_keep_their_seeds_and_cut_ones_do_not():
    torch.manual_seed(0)
    host = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    kasmina.wrap(host, torch.randn(2, 4))
    grafter = kasmina.Grafter(kasmina.host_of(host), None)
    within = grafter.germinate("low_rank", "0", "1", 100, seed_id="within")
    across = grafter.germinate("low_rank", "1", "2", 100, seed_id="across")
    for seed in (within, across):
        nn.init.normal_(seed.body.up.weight)
    plain = copy.deepcopy(host)
    kasmina.Grafter(kasmina.host_of(plain), None).cull("across")
    x = torch.randn(2, 4)
    checkpoint_sequential(host, 3, x, use_reentrant=False).square().sum().backward()
    plain(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(host.get_parameter(name).grad, parameter.grad)
    assert (within.errors, across.last_error) == (0, upstream.CHECKPOINTED)


class Recursive(nn.Module):
    """A module that calls itself between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if depth:
            hidden = hidden + self(x + 1, depth - 1)
        return self.second(hidden)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_nested_call_keeps_its_own(depth):
    torch.manual_seed(0)
    host = Recursive()
    kasmina.wrap(host, torch.randn(2, 4))
    seed = kasmina.Grafter(kasmina.host_of(host), None).germinate("low_rank", "first", "second", 100, seed_id="s")
    nn.init.normal_(seed.body.up.weight)

    def by_hand(x, depth):
        hidden = torch.tanh(functional.linear(x, host.first.weight, host.first.bias))
        if depth:
            hidden = hidden + by_hand(x + 1, depth - 1)
        out = functional.linear(hidden, host.second.weight, host.second.bias)
        return out + seed.body.up(seed.body.down(x))

    x = torch.randn(2, 4)
    wanted = torch.autograd.grad(by_hand(x, depth).square().sum(), list(host.parameters()))
    got = torch.autograd.grad(host(x, depth).square().sum(), list(host.parameters()))
    torch.testing.assert_close(got, wanted)
    assert seed.errors == 0


def test_parts_that_are_called_in_turn_without_the_module_around_them_belong_together():
    host, seed = grown()
    x = inputs(1)[0]
    torch.testing.assert_close(host.head(host.block.second(torch.tanh(host.block.first(x)))), reference(host, seed)(x))
    assert seed.errors == 0


def test_parts_that_are_called_crosswise_are_left_out():
    host, seed = grown()
    a, b = inputs(2)
    hidden = [host.block.first(a), host.block.first(b)]
    second = host.block.second
    for one in hidden:
        assert torch.equal(second(one), functional.linear(one, second.weight, second.bias))
    assert (seed.errors, seed.last_error) == (2, upstream.NOT_RUN)
    host.block.first(a)
    host.block.first(b)
    host.block.second(hidden[0])
    assert seed.last_error == upstream.TWICE


def test_an_input_that_is_changed_in_place_is_not_handed_over():
    host, seed = grown("in place")
    host(inputs(1, requires_grad=False)[0])
    assert (seed.errors, seed.last_error) == (1, upstream.CHANGED)


def test_a_call_that_ends_in_an_error_leaves_nothing_behind(monkeypatch):
    host, seed = grown()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", lambda _: torch.ones(2) + torch.ones(3))
        with pytest.raises(RuntimeError, match="must match"):
            host(inputs(1)[0])
    assert seed._upstream._open == {}
    host.block.second(torch.randn(4, 5))
    assert seed.last_error == upstream.NOT_RUN
    check(host, seed, reference(host, seed))


def test_threads_do_not_mix_what_they_keep():
    host, seed = grown()
    plain = reference(host, seed)
    together = threading.Barrier(2)
    wrong = []

    def wait_for_the_other(*_):
        together.wait(10)

    host.block.first.register_forward_hook(wait_for_the_other)
    threads = [threading.Thread(target=lambda n=n: wrong.extend(_differs(host, plain, n))) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert seed.errors == 0
    assert seed._upstream._open == {}


def _differs(host: Host, plain: Reference, number: int) -> list[int]:
    x = inputs(2)[number]
    with torch.no_grad():
        return [] if torch.allclose(host(x), plain(x), atol=1e-5) else [number]


def test_copies_and_saved_hosts_keep_their_own():
    host, seed = grown()
    host.block.first(inputs(1)[0])  # Something is under way.
    saved = io.BytesIO()
    torch.save(host, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(host), torch.load(saved, weights_only=False)):
        mine = kasmina.host_of(twin).seeds["s"]
        twin.block.second(torch.randn(4, 5))
        assert mine.last_error == upstream.NOT_RUN
        check(twin, mine, reference(twin, mine))
    assert seed.errors == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # By the compiler itself.
def test_a_span_is_compiled_as_a_whole():
    host, seed = grown()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    x = inputs(1)[0]
    torch.testing.assert_close(compiled(x), reference(host, seed)(x))
    seed.count_unusable()
    assert seed.errors == 0


def test_what_is_kept_does_not_outlive_the_pass():
    host, seed = grown("parts apart, not reentrant")
    host(inputs(1)[0]).sum().backward()
    seed.advance()
    assert seed._upstream._open == {}
