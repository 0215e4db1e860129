"""The callback in Lightning's own Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from esperml import kasmina
from esperml.v1 import run_pb2

lightning = pytest.importorskip("lightning.pytorch")

from esperml.kasmina.lightning import EsperCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, *, fails_at: int = -1, inner: bool = True) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.net = kasmina.wrap(net, torch.ones(4, 6)) if inner else net
        self.fails_at = fails_at
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == self.fails_at:
            raise ZeroDivisionError("division by zero")
        loss = functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("held_out", functional.cross_entropy(self.net(batch[0] * 100), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"},
        }


def fit(module, callback, tmp_path, *, validate=False, **settings):
    x = torch.randn(80, 6)
    batches = DataLoader(TensorDataset(x, (x[:, 0].sign() + 1).long()), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[] if callback is None else [callback],
        **settings,
    )
    trainer.fit(module, batches, batches if validate else None)


def told(bench, **settings):
    return EsperCallback(bench.link, run="r", mode="act", report_every=5, overhead_ceiling=None, **settings)


def test_a_fit_is_measured_and_grows(bench, germination, tmp_path):
    module, callback = Module(), told(bench)
    bench.waiting.append(germination("0", "2"))
    fit(module, callback, tmp_path, validate=True)
    assert callback.session.failure == ""
    assert (callback.session.steps, callback.session.decisions_applied) == (20, 1)
    assert [(report.step, report.epoch) for report in bench.reports] == [(5, 0), (10, 0), (15, 1), (20, 1)]
    assert [report.run.train_loss for report in bench.reports] == pytest.approx(module.losses[4::5])
    assert all(signal.HasField("gradient_norm") for signal in bench.reports[0].layers)
    assert bench.reports[-1].seeds[0].gradient_norm > 0
    assert [report.run.learning_rate for report in bench.reports] == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    assert bench.payloads("run_ended")[0].end == run_pb2.RUN_END_COMPLETED


def test_batches_that_accumulate_make_one_step(bench, tmp_path):
    module, callback = Module(), told(bench)
    fit(module, callback, tmp_path, accumulate_grad_batches=2)
    assert (callback.session.steps, len(bench.reports)) == (10, 2)
    assert bench.reports[0].run.train_loss == pytest.approx(sum(module.losses[8:10]) / 2)
    assert callback.session.failure == ""


def test_the_weights_are_those_of_a_fit_without_it(bench, tmp_path):
    weights = []
    for callback in (None, told(bench)):
        torch.manual_seed(5)
        module = Module()
        fit(module, callback, tmp_path)
        weights.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_a_fit_that_raises_ends_the_run_as_failed(bench, tmp_path):
    callback = told(bench)
    with pytest.raises(ZeroDivisionError):
        fit(Module(fails_at=3), callback, tmp_path)
    ended = bench.payloads("run_ended")[0]
    assert (ended.end, ended.error) == (run_pb2.RUN_END_FAILED, "ZeroDivisionError: division by zero")


def test_what_it_cannot_drive_is_refused_in_words(bench, tmp_path):
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(kasmina.KasminaError, match="automatic optimization with one optimizer"):
        fit(module, told(bench), tmp_path)
    with pytest.raises(kasmina.KasminaError, match="the model has 0 wrapped modules in it"):
        fit(Module(inner=False), told(bench), tmp_path)
