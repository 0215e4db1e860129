import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from esperml.contract import InvalidFieldError
from esperml.settings import TamiyoSettings
from esperml.tamiyo import checkpoint, store
from esperml.tamiyo.checkpoint import METADATA_FILE, WEIGHTS_FILE, CheckpointError, Metadata
from esperml.tamiyo.store import NoPromotionError, PolicyStore, UnknownPolicyError


def rewrite(path, **changes):
    description = json.loads((path / METADATA_FILE).read_text())
    (path / METADATA_FILE).write_text(json.dumps({**description, **changes}))


def reweigh(path, change):
    tensors = load_file(path / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, path / WEIGHTS_FILE)
    rewrite(path, weights_sha256=hashlib.sha256((path / WEIGHTS_FILE).read_bytes()).hexdigest())


def test_what_was_saved_comes_back(tmp_path, network):
    version = checkpoint.save(tmp_path / "a", network, Metadata(metrics={"accuracy": 0.5}, notes={"data": "digits"}))
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.version == version
    assert loaded.metadata.metrics == {"accuracy": 0.5}
    assert loaded.metadata.notes == {"data": "digits"}
    assert loaded.network.config == network.config
    assert not loaded.network.training
    for name, weights in network.state_dict().items():
        assert torch.equal(weights, loaded.network.state_dict()[name])


def test_another_training_is_another_version(tmp_path, network):
    first = checkpoint.save(tmp_path / "a", network)
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    assert checkpoint.save(tmp_path / "a", network) != first


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"feature_version": 2}, "feature_version is 2, but this program has 1"),
        ({"format_version": 9}, "format_version is 9"),
        ({"vocabulary": ["mlp"]}, "blueprint"),
        ({"vocabulary": ["mlp", "mlp", "gate"]}, "vocabulary"),
        ({"hidden": 32}, "of shape"),
        ({"hidden": -1}, "hidden"),
        ({"layers": 4}, "no tensor messages.3"),
        ({"layers": 2}, "unknown tensor messages.2"),
        ({"node_features": ["health"]}, "node_features differ"),
        ({"surprise": 1}, "surprise"),
        ({"weights_sha256": "0"}, "damaged"),
    ],
)
def test_what_does_not_fit_is_named(saved, changes, named):
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=named) as caught:
        checkpoint.load(saved)
    assert caught.value.path == saved


def test_features_in_another_order_are_refused(saved):
    names = json.loads((saved / METADATA_FILE).read_text())["graph_features"]
    rewrite(saved, graph_features=names[::-1])
    with pytest.raises(CheckpointError, match="their order"):
        checkpoint.load(saved)


def test_a_missing_tensor_is_named(saved):
    reweigh(saved, lambda tensors: tensors.pop("target.bias"))
    with pytest.raises(CheckpointError, match=r"no tensor target\.bias"):
        checkpoint.load(saved)


def test_weights_that_are_not_numbers_are_refused(saved, network, tmp_path):
    reweigh(saved, lambda tensors: tensors["target.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"target\.bias holds NaN"):
        checkpoint.load(saved)
    with torch.no_grad():
        network.target.bias.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        checkpoint.save(tmp_path / "bad", network)


def test_a_truncated_file_is_damaged_and_no_safetensors_file(saved):
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(saved)
    rewrite(saved, weights_sha256=hashlib.sha256((saved / WEIGHTS_FILE).read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_description_that_is_none_is_refused(saved, text):
    (saved / METADATA_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=METADATA_FILE):
        checkpoint.load(saved)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.load(tmp_path / "nowhere")


def test_plain_policies_are_always_there(tmp_path):
    policies = PolicyStore(tmp_path, "nothing")
    assert policies.default.facts.name == "nothing"
    assert {policy.facts.name for policy in policies.policies} == {"chance", "explore", "nothing"}
    assert policies.get("") is policies.default
    with pytest.raises(UnknownPolicyError, match="there are chance, explore, nothing"):
        policies.get("oracle")


def test_the_default_may_be_the_path_of_a_checkpoint(saved):
    policies = PolicyStore.from_settings(TamiyoSettings(policy=str(saved), policy_dir=saved.parent))
    assert policies.default.facts.name == "saved"
    assert policies.default.facts.kind == "gcn"
    assert policies.default.facts.trained_at is not None


def test_without_a_shipped_policy_the_store_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHIPPED_PATH", tmp_path / "none")
    with pytest.raises(CheckpointError, match="ships no trained policy"):
        PolicyStore(tmp_path)


def test_the_shipped_policy_is_loaded_when_it_is_asked_for(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(store, "SHIPPED_PATH", saved)
    assert PolicyStore(tmp_path).default.facts.name == "shipped"


def test_a_promotion_can_be_rolled_back(saved):
    policies = PolicyStore(saved.parent, "chance")
    promoted = policies.promote("better", "saved")
    assert policies.default is promoted
    assert policies.roll_back().facts.name == "chance"
    with pytest.raises(NoPromotionError):
        policies.roll_back()


@pytest.mark.parametrize("path", ["../saved", "/etc", "a/../../saved"])
def test_a_promotion_from_outside_the_folder_is_refused(saved, path):
    policies = PolicyStore(saved.parent / "policies", "chance")
    with pytest.raises(InvalidFieldError, match=r"checkpoint: .* leads out"):
        policies.promote("x", path)


def test_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "link").symlink_to(saved)
    with pytest.raises(InvalidFieldError, match="leads out"):
        PolicyStore(folder, "chance").promote("x", "link")


@pytest.mark.parametrize("name", ["", "chance"])
def test_a_promotion_needs_a_name_of_its_own(saved, name):
    with pytest.raises(InvalidFieldError, match="name"):
        PolicyStore(saved.parent, "chance").promote(name, "saved")
