"""What the callbacks of training frameworks have in common."""

from __future__ import annotations

import importlib
import sys
import time

import pytest
import torch
from torch import nn

from esperml import kasmina
from esperml.kasmina.callbacks import Attached, host_within


@pytest.mark.parametrize(
    ("callback", "package", "extra"),
    [("lightning", "lightning.pytorch", "lightning"), ("huggingface", "transformers", "transformers")],
)
def test_a_framework_that_is_missing_is_named_with_its_extra(monkeypatch, callback, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"esperml.kasmina.{callback}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'esperml\[{extra}\]'"):
        importlib.import_module(f"esperml.kasmina.{callback}")


def test_the_wrapped_part_of_a_model_is_found(case):
    one, other = case("mlp").model, case("conv").model
    assert host_within(nn.ModuleList([nn.Linear(2, 2), one])) is kasmina.host_of(one)
    with pytest.raises(kasmina.KasminaError, match="has 2 wrapped modules"):
        host_within(nn.ModuleList([one, other]))


def test_a_pause_is_no_part_of_training(case, bench):
    here = case("mlp")
    attached = Attached(bench.link, run="r", report_every=1, overhead_ceiling=None)
    attached.pause()
    attached.resume()
    attached.start(here.model, here.optimizer, None)
    paused = 0.0
    for step in range(3):
        loss = here.loss()
        loss.backward()
        here.optimizer.step()
        attached.take_loss(loss)
        attached.take_loss(2 * loss)
        attached.step(epoch=0, mean=step == 2)
        attached.pause()
        start = time.perf_counter()
        torch.linalg.svd(torch.randn(100, 100))
        paused += time.perf_counter() - start
    attached.end()
    attached.end()
    first, _, third = bench.reports
    assert first.run.train_loss > 2 * third.run.train_loss
    assert attached.session._clock.total_left_out >= paused > 0
    assert not here.model[0]._forward_hooks
