"""Processes that train one model together: real ones, two of them, over gloo."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from esperml import kasmina
from esperml.kasmina import stages
from esperml.kasmina.errors import KasminaError

WORKER = Path(__file__).parent / "rank.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(rank), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=150)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, words in zip(processes, said, strict=True):
        assert process.returncode == 0, words
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def one_process(tmp_path):
    """This process as the only rank of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load_worker():
    spec = spec_from_file_location("rank", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            same(value, other[name])
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


@pytest.mark.parametrize("run", ["changes", "parts", "static", "quiet", "poison", "broken"])
def test_ranks_have_the_same_weights_and_seeds_at_every_step(ranks, run):
    leader, follower = (found[run] for found in ranks)
    same(leader["model"], follower["model"])
    same(leader["optimizer"], follower["optimizer"])
    assert leader["seeds"] == follower["seeds"]
    assert leader["structure_version"] == follower["structure_version"] or run == "broken"
    assert leader["alphas"] == follower["alphas"]


@pytest.mark.parametrize("run", ["changes", "parts", "static"])
def test_all_changes_come_through_in_their_order(ranks, run):
    leader, follower = (found[run] for found in ranks)
    assert (leader["failure"], follower["failure"]) == ("", "")
    assert [(name, stages.stage_name(stage), alpha) for name, stage, alpha, *_ in leader["seeds"]] == [
        ("seed-d-one", "fossilised", 1.0),
        ("seed-d-three", "holding", 0.5),
    ]
    assert len(leader["actions"]) == 7
    assert [words for words in follower["actions"] if "here" in words] == [
        f"seed-{name} is here, as on rank 0" for name in ("d-one", "d-two", "d-three")
    ]
    assert "seed-d-two is gone, as on rank 0" in follower["actions"]


def test_two_processes_learn_what_one_learns_from_the_whole_batch(ranks):
    worker = load_worker()
    expected = worker.train("alone", worker.CHANGES, 0, 1)
    leader = ranks[0]["changes"]
    assert leader["seeds"] == expected["seeds"]
    for name, tensor in expected["model"].items():
        torch.testing.assert_close(leader["model"][name], tensor, rtol=1e-3, atol=1e-4)


def test_rank_0_alone_talks_and_measures(ranks):
    leader, follower = (found["changes"] for found in ranks)
    assert leader["reports"] == 20
    assert leader["told"] > 20
    assert (follower["reports"], follower["told"]) == (0, 0)


def test_a_roll_back_is_one_of_all_ranks(ranks):
    leader, follower = (found["poison"] for found in ranks)
    assert any("rolled back" in words for words in leader["actions"])
    assert (leader["failure"], follower["failure"]) == ("", "")
    assert all(torch.isfinite(tensor).all() for tensor in follower["model"].values())


def test_where_a_rank_cannot_follow_all_stop_without_the_seed(ranks):
    leader, follower = (found["broken"] for found in ranks)
    assert "the session of another rank has failed" in leader["failure"]
    assert "learning-rate scheduler" in follower["failure"]
    assert leader["seeds"] == []
    assert len(leader["losses"]) == 30


def test_ranks_that_do_not_go_together_are_told_so_on_all_of_them(ranks):
    for found in ranks:
        assert found["refused"] == {
            "host": "the host differs between the ranks: rank 1 has another one than rank 0",
            "run": "run differs between the ranks: rank 1 has another one than rank 0",
        }


def test_processes_may_train_models_of_their_own(ranks):
    assert [found["alone"] for found in ranks] == [0, 1]


def test_without_other_processes_there_is_nothing_to_agree_on(case, bench, one_process):
    here = case("mlp")
    with kasmina.connect(bench.link, here.model, here.optimizer, run="r", distributed=True) as session:
        assert type(session) is kasmina.Session


def test_other_processes_that_cannot_be_reached_are_refused(case, bench):
    here = case("mlp")
    with pytest.raises(KasminaError, match="init_process_group"):
        kasmina.connect(bench.link, here.model, here.optimizer, run="r", distributed=True)


def test_sharded_parameters_are_refused_by_name(bench, one_process):
    model = kasmina.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(2, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(KasminaError, match=r"'0.weight' is sharded \(FSDP"):
        kasmina.connect(bench.link, model, optimizer, run="r")
