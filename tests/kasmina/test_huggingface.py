"""The callback in the Trainer of Hugging Face's transformers, on a tiny GPT-2 with random weights."""

from __future__ import annotations

import pytest
import torch

from esperml import kasmina
from esperml.v1 import run_pb2

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from esperml.kasmina.huggingface import EsperCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2():
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    return kasmina.wrap(model, {"input_ids": torch.ones(2, 8, dtype=torch.long)}, layers=["c_fc", "mlp.c_proj"])


class Recorder(transformers.TrainerCallback):
    """Keeps what the Trainer itself logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def trainer_of(model, callbacks, tmp_path, **arguments):
    tokens = [torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i)) for i in range(40)]
    data = [{"input_ids": ids, "labels": ids} for ids in tokens]
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 3,
        **arguments,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=callbacks,
    )


def told(bench, **settings):
    return EsperCallback(bench.link, run="r", mode="act", report_every=5, overhead_ceiling=None, **settings)


def test_a_training_is_measured_and_grows(bench, germination, tmp_path):
    model, callback, recorder = gpt2(), told(bench), Recorder()
    layer = kasmina.host_of(model).layers[0].name
    bench.waiting.append(germination(layer, layer, blueprint="low_rank"))
    with callback:
        trainer_of(model, [callback, recorder], tmp_path, eval_strategy="epoch").train()
    assert callback.session.failure == ""
    assert (callback.session.steps, callback.session.decisions_applied) == (20, 1)
    assert [(report.step, report.epoch) for report in bench.reports] == [(5, 0), (10, 0), (15, 1), (20, 1)]
    assert [report.run.train_loss for report in bench.reports] == pytest.approx(recorder.losses[4::5], abs=1e-3)
    assert all(signal.HasField("gradient_norm") for signal in bench.reports[0].layers)
    assert bench.reports[-1].seeds[0].gradient_norm > 0
    assert [event.end for event in bench.payloads("run_ended")] == [run_pb2.RUN_END_COMPLETED]


def test_batches_that_accumulate_make_one_step(bench, tmp_path):
    callback, recorder = told(bench), Recorder()
    trainer_of(gpt2(), [callback, recorder], tmp_path, gradient_accumulation_steps=2).train()
    assert (callback.session.steps, len(bench.reports)) == (10, 2)
    assert [report.run.train_loss for report in bench.reports] == pytest.approx(recorder.losses[4::5], abs=1e-3)


def test_the_weights_are_those_of_a_training_without_it(bench, tmp_path):
    weights = []
    for callbacks in ([], [told(bench)]):
        model = gpt2()
        trainer_of(model, callbacks, tmp_path, num_train_epochs=1).train()
        weights.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_a_training_that_raises_ends_the_run_as_failed(bench, tmp_path):
    class Breaking(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise ZeroDivisionError("division by zero")

    callback = told(bench)
    with pytest.raises(ZeroDivisionError), callback:
        trainer_of(gpt2(), [callback, Breaking()], tmp_path).train()
    ended = bench.payloads("run_ended")[0]
    assert (ended.end, ended.error) == (run_pb2.RUN_END_FAILED, "ZeroDivisionError: division by zero")
    assert callback.session.steps == 3


def test_a_plain_model_is_refused_in_words(bench, tmp_path):
    model = kasmina.unwrap(gpt2())
    with pytest.raises(kasmina.KasminaError, match="the model has 0 wrapped modules in it"):
        trainer_of(model, [told(bench)], tmp_path).train()
