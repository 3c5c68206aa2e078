"""Checkpoints of equivision, as far as they can be made here: its networks with random weights and statistics."""

import copy
import json

import pytest
import safetensors.torch
import torch

from gzoo import equivision
from gzoo.check import check, relative_error
from gzoo.equivision import Architecture, create, escnn_network, import_checkpoint

SMALL = {
    "d1resnet18": Architecture("d1", 18, 2),
    "c4resnet50": Architecture("c4", 50, 2),
    "d4resnet18": Architecture("d4", 18, 2),
    "d4resnet101": Architecture("d4", 101, 1),
    "c8resnet18": Architecture("c8", 18, 2),
    "d8resnet18": Architecture("d8", 18, 1),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, row in SMALL.items():
        monkeypatch.setitem(equivision.ARCHITECTURES, name, row)


def randomized(network):
    """The network in eval mode, with random numbers with which its maps stay of order one."""
    network.train()
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if name.endswith("weights"):
                tensor.normal_(std=tensor.numel() ** -0.25)
            elif name.endswith(("weight", "running_var", "bias", "running_mean")) and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.5)
        for _ in range(2):  # statistics near those of the maps
            network(torch.randn(4, 3, 65, 65))
    return network.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An escnn network by the name of its model, and the file that holds its state_dict."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp(name) / "checkpoint.pt"
            network = randomized(escnn_network(SMALL[name]))
            torch.save(network.train().state_dict(), path)
            made[name] = network.eval(), path
        return made[name]

    return get


@pytest.mark.parametrize("name", ["c4resnet50", "d1resnet18", "d8resnet18"])  # both kinds of blocks and groups
def test_logits_equal_the_originals_where_strides_fit_and_everywhere_with_original_strides(name, saved, tmp_path):
    network, path = saved(name)
    symmetric = import_checkpoint(path, name, tmp_path / "symmetric")
    original = import_checkpoint(path, name, tmp_path / "original", strides="original")
    for size, fits in ((33, True), (50, False)):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert relative_error(original(x), network(x)) < 1e-5
            assert (relative_error(symmetric(x), network(x)) < 1e-5) == fits


@pytest.mark.parametrize("name", ["d1resnet18", "d4resnet18"])
def test_an_imported_network_is_exact_at_every_size_unless_it_keeps_the_original_strides(name, saved, tmp_path):
    _, path = saved(name)
    assert check(import_checkpoint(path, name, tmp_path), 64).worst < 1e-12
    assert check(import_checkpoint(path, name, tmp_path, strides="original"), 64).worst > 1e-4


def test_the_folder_holds_the_weights_and_says_what_they_are(saved, tmp_path):
    _, path = saved("d4resnet18")
    model = import_checkpoint(path, "d4resnet18", tmp_path, strides="original")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "d4_resnet18"
    assert config["pretrained_cfg"]["tag"] == "equivision_in1k"
    assert config["pretrained_cfg"]["interpolation"] == "bilinear"
    assert config["model_args"]["strides"] == "original"
    assert config["gzoo"] == {"group": "p4m"}
    again = create("d4resnet18", "original").eval()
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert again(x).equal(model(x))


def test_a_safetensors_file_and_one_saved_in_eval_mode_are_the_same_checkpoint(saved, tmp_path):
    network, path = saved("d4resnet18")
    expected = import_checkpoint(path, "d4resnet18", tmp_path / "out").state_dict()
    # In eval mode escnn keeps expanded filters, too; in safetensors no two layers share a basis.
    state = {key: value.detach().clone().contiguous() for key, value in network.eval().state_dict().items()}
    assert "conv1.filter" in state
    safetensors.torch.save_file(state, tmp_path / "checkpoint.safetensors")
    found = import_checkpoint(tmp_path / "checkpoint.safetensors", "d4resnet18", tmp_path / "out").state_dict()
    assert all(found[key].equal(value) for key, value in expected.items())


def test_the_basis_in_the_file_is_used_and_no_other_layer_sees_it(saved, tmp_path):
    network, path = saved("d4resnet18")
    state = torch.load(path)
    fresh = copy.deepcopy(escnn_network(SMALL["d4resnet18"]).train().state_dict())
    for key, value in state.items():  # a version of escnn with the functions in another order
        if key.endswith("sampled_basis"):
            state[key] = value.flip(0)
        elif key.endswith("weights"):
            dimension = next(len(state[k]) for k in state if k.startswith(key.removesuffix("weights") + "_basis"))
            state[key] = value.view(-1, dimension).flip(1).flatten()
    torch.save(state, tmp_path / "other.pt")
    model = import_checkpoint(tmp_path / "other.pt", "d4resnet18", tmp_path)
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        assert relative_error(model(x), network(x)) < 1e-5
    again = escnn_network(SMALL["d4resnet18"]).train().state_dict()
    assert all(again[key].equal(fresh[key]) for key in fresh if key.endswith("sampled_basis"))


def test_a_truncated_file_is_refused(saved, tmp_path):
    content = saved("d4resnet18")[1].read_bytes()
    for name in ("cut.pt", "cut.safetensors"):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{name}: the file is truncated or corrupt, .*; download it again"):
            import_checkpoint(tmp_path / name, "d4resnet18", tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_other_files_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pt: no such file; fetch a checkpoint"):
        import_checkpoint(tmp_path / "none.pt", "d4resnet18", tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list, no state_dict"):
        import_checkpoint(tmp_path / "list.pt", "d4resnet18", tmp_path)


def test_a_name_that_equivision_does_not_have_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of 'c8resnet101'; it has d1resnet18, c4resnet18"):
        import_checkpoint(saved("d4resnet18")[1], "c8resnet101", tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of 'p4_resnet18'"):
        create("p4_resnet18")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d1resnet18", r"of equivision's d1resnet18: \S+ is missing; .* and \d+ more"),
        ("c4resnet50", r"of equivision's c4resnet50: bn1.batch_norm_\[4\].weight is missing; .* and \d+ more"),
        ("c8resnet18", r"of equivision's c8resnet18: layer1.0.conv1: the filters differ"),  # all shapes are the same
        ("d8resnet18", r"of equivision's d8resnet18: bn1.batch_norm_\[16\].weight is missing"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(name, message, saved, tmp_path):
    with pytest.raises(ValueError, match=rf"checkpoint.pt is no checkpoint {message}"):
        import_checkpoint(saved("d4resnet18")[1], name, tmp_path)


def test_a_checkpoint_without_one_of_its_weights_is_refused(saved, tmp_path):
    state = torch.load(saved("d4resnet18")[1])
    del state["layer3.1.conv2.weights"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"d4resnet18: layer3.1.conv2.weights is missing$"):
        import_checkpoint(tmp_path / "part.pt", "d4resnet18", tmp_path)


# Millions of parameters, from equivision's README; c4resnet18 has 11.7 there, but its width of 39 fields gives 11.45.
PUBLISHED = {
    "d1resnet18": 11.5,
    "c4resnet18": 11.5,
    "d4resnet18": 11.7,
    "c8resnet18": 11.7,
    "d8resnet18": 11.9,
    "d1resnet50": 25.7,
    "c4resnet50": 24.7,
    "d4resnet50": 24.8,
    "c8resnet50": 24.8,
    "d1resnet101": 44.7,
    "c4resnet101": 43.4,
    "d4resnet101": 43.9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_has_as_many_parameters_as_equivision_publishes(name, monkeypatch):
    monkeypatch.undo()  # the true widths
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in create(name).parameters()) / 1e6
    assert abs(millions - PUBLISHED[name]) <= 0.051
    assert set(PUBLISHED) == set(equivision.ARCHITECTURES)
