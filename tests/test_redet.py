"""Checkpoints of ReDet, as far as they can be made here: its networks out of escnn's modules, with random weights.

escnn names what is in a state_dict as e2cnn does, its forerunner by the same authors, which ReDet is written in.
"""

import functools
import json
import re

import pytest
import timm
import torch
from torch import nn

from gzoo import _escnn, equivision, groups, redet
from gzoo.check import check, relative_error
from gzoo.cli import main
from gzoo.redet import import_checkpoint
from tests.test_equivision import randomized


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(redet, "FIELDS", 1)


def original(depth=50, group="c8"):
    """A ReResNet: the same modules as equivision's, with other frequencies and without its head."""
    network = equivision._ResNet(groups.get(group), depth, 1)
    enn = _escnn.load().nn
    for path, conv in list(network.named_modules()):
        if isinstance(conv, enn.R2Conv):
            sizes = (conv.kernel_size, conv.padding, conv.stride)
            types = (conv.in_type, conv.out_type)
            new = enn.R2Conv(*types, *sizes, bias=False, frequencies_cutoff=lambda r: 3 * r, initialize=False)
            network.set_submodule(path, new)
    network.gpool, network.fc = None, nn.Linear(network.avgpool.in_type.size, 5)
    return randomized(Features(network))


class Features(nn.Module):
    """What an escnn ResNet gives at the end of its stages, and the logits of ReDet's classifier."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        network, maps = self.network, []
        y = network.maxpool(network.relu1(network.bn1(network.conv1(network.wrap(x, network.in_type)))))
        for i in range(1, 5):
            y = network.get_submodule(f"layer{i}")(y)
            maps.append(y.tensor)
        return [*maps, network.fc(maps[-1].mean((2, 3)))]


@functools.cache  # escnn expands its filters anew for each
def state_of(network, form):
    """A state_dict with ReDet's keys: "eval" with filters, "train" without, "exported" with filters alone."""
    network.train(form == "train")
    state = {key.removeprefix("network."): value.detach().clone() for key, value in network.state_dict().items()}
    network.eval()
    if form == "exported":
        state = {key.replace(".filter", ".weight"): v for key, v in state.items() if re.search(r"filter|fc|norm", key)}
        for key in [key for key in state if ".batch_norm_[8]." in key]:
            value = state.pop(key)
            exported = value.repeat_interleave(8) if value.ndim else value
            state[key.replace(".batch_norm_[8].", ".")] = exported
    return {f"head.{key}" if key.startswith("fc.") else key: value for key, value in state.items()}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return original()


@pytest.fixture
def checkpoint(network, tmp_path):
    """Writes the state_dict of a form, changed by a function, as mmcv does."""

    def write(form="train", change=lambda state: state, network=network):
        state = change(dict(state_of(network, form)))
        path = tmp_path / "checkpoint.pth"
        torch.save({"meta": {"epoch": 100, "CLASSES": ("a", "b")}, "state_dict": state, "optimizer": {}}, path)
        return path

    return write


def prefixed(state):
    return {key if key.startswith("head.") else f"backbone.{key}": value for key, value in state.items()}


def detector(state):
    backbone = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("head.")}
    return backbone | {"neck.lateral_convs.0.conv.weights": torch.ones(3), "rpn_head.rpn_reg.weight": torch.ones(3)}


def all_maps(model, x):
    with torch.no_grad():
        return model.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)


FORMS = {
    "eval": ("eval", prefixed),
    "train": ("train", prefixed),
    "published": ("train", dict),
    "exported": ("exported", prefixed),
    "detector": ("eval", detector),
}


@pytest.mark.parametrize("form", FORMS)
def test_features_equal_the_originals_with_original_strides(form, network, checkpoint, tmp_path):
    model = import_checkpoint(checkpoint(*FORMS[form]), tmp_path, strides="original")
    for size in [(33, 33), (50, 64)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            *maps, _ = network(x)
        assert max(map(relative_error, all_maps(model, x), maps)) < 1e-5


def test_features_equal_the_originals_with_symmetric_strides_where_they_fit(network, checkpoint, tmp_path):
    model = import_checkpoint(checkpoint(), tmp_path)
    for size, fits in ((33, True), (65, True), (64, False), (50, False)):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            *maps, _ = network(x)
        assert (max(map(relative_error, all_maps(model, x), maps)) < 1e-5) == fits


def test_logits_are_the_mean_of_the_originals_over_the_elements_acting_on_the_features(network, checkpoint, tmp_path):
    model, x = import_checkpoint(checkpoint(), tmp_path, strides="original"), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        *_, last, logits = network(x)
        poses = [network.network.fc(model.group.transform_features(last, g).mean((2, 3))) for g in (0, 2, 4, 6)]
        fibres = last.mean((2, 3)).unflatten(1, (-1, 8))
        poses += [network.network.fc(fibres.roll(g, 2).flatten(1)) for g in (1, 3, 5, 7)]
        assert relative_error(model(x), torch.stack(poses).mean(0)) < 1e-5
        assert relative_error(model(x), logits) > 1e-3


def test_an_imported_network_is_exact_at_every_size_unless_it_keeps_the_original_strides(checkpoint, tmp_path):
    path = checkpoint()
    assert check(import_checkpoint(path, tmp_path / "symmetric"), 48).worst < 1e-12
    assert check(import_checkpoint(path, tmp_path / "original", strides="original"), 48).worst > 1e-4


@pytest.mark.parametrize("classes", [0, 5])
def test_timm_loads_the_folder_and_its_features(classes, network, checkpoint, tmp_path):
    path, out = checkpoint("eval", prefixed if classes else detector), tmp_path / "out"
    assert main(["import", "redet", str(path), "--out", str(out), "--strides", "original"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["pretrained_cfg"]["tag"]) == ("c8_resnet50", "redet")
    assert (config["num_classes"], config["gzoo"]) == (classes, {"group": "c8"})
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    pyramid = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True, out_indices=(1, 4)).eval()
    other = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        first, *_, last, _ = network(x)
        for found, expected in zip(pyramid(x), [first, last], strict=True):
            assert relative_error(found, expected) < 1e-5
        assert relative_error(loaded.forward_features(x), last) < 1e-5
        assert relative_error(other.forward_features(x), last) < 1e-5
        assert (loaded(x).shape, other(x).shape) == ((1, classes or 32), (1, 3))


def test_the_depth_is_read_off_the_file(checkpoint, tmp_path):
    model = import_checkpoint(checkpoint(network=original(101)), tmp_path)
    assert len(model.layer3) == 23
    assert model.pretrained_cfg["architecture"] == "c8_resnet101"


def without(part):
    return lambda state: {key: value for key, value in state.items() if part not in key}


def with_other(part, change):
    return lambda state: {key: change(value) if part in key else value for key, value in state.items()}


def turned_the_other_way(filters):
    return filters[[0, 7, 6, 5, 4, 3, 2, 1]]


def noisy(filters):
    return filters + 1e-2 * filters.abs().max() * torch.randn_like(filters)


REFUSED = {
    "no filters": (
        "train",
        without("sampled_basis"),
        r"conv1 has neither a filter nor .*model.eval\(\).state_dict\(\)",
    ),
    "no weights": ("train", without("layer2.0.conv2.weights"), r"layer2.0.conv2.weights is missing$"),
    "no norm": ("eval", without("layer1.1.bn2.batch_norm_[8].bias"), r"layer1.1.bn2.batch_norm_\[8\].bias is missing$"),
    "no bias": ("eval", without("head.fc.bias"), r"head.fc.bias is missing$"),
    "other turns": (
        "eval",
        with_other("conv1.filter", turned_the_other_way),
        r"conv1: the filters differ by .* up to 3r",
    ),
    "noise": ("eval", with_other("layer3.4.conv2.filter", noisy), r"layer3.4.conv2: the filters differ by"),
    "noise of 1x1": ("eval", with_other("downsample.0.filter", noisy), r"downsample.0: the filters differ by"),
    "not a number": (
        "eval",
        with_other("conv1.filter", lambda f: f * float("nan")),
        r"conv1: the filters differ by inf",
    ),
    "other width": (
        "eval",
        with_other("conv1.filter", lambda f: f[:8, :1]),
        r"filter of conv1 is \(8, 1, 7, 7\), not \(8, 3, 7, 7\)",
    ),
    "other coefficients": ("train", with_other("conv1.weights", lambda w: w[1:]), r"conv1.weights has \d+ numbers"),
    "free norm": (
        "exported",
        with_other("layer1.0.bn1.bias", lambda b: b + torch.arange(8)),
        "bn1 is not the same for",
    ),
    "more blocks": (
        "eval",
        lambda s: s | {"layer4.3.conv1.filter": torch.ones(1)},
        r"\(3, 4, 6, 4\) blocks, not \(3, 4",
    ),
    "more layers": (
        "eval",
        lambda s: s | {"layer4.2.conv4.filter": torch.ones(1)},
        "conv4.filter is not in a ReResNet-50",
    ),
    "nothing": ("eval", lambda s: {}, r"\(0, 0, 0, 0\) blocks"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_of_something_else_is_refused(what, checkpoint, tmp_path):
    form, change, message = REFUSED[what]
    with pytest.raises(ValueError, match=rf"checkpoint.pth is no checkpoint of a ReResNet over C8: .*{message}"):
        import_checkpoint(checkpoint(form, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_of_another_group_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"over C8: the filter of conv1 is \(4, 3, 7, 7\), not \(8, 3, 7, 7\)"):
        import_checkpoint(checkpoint("eval", network=original(group="c4")), tmp_path)


def test_a_file_that_holds_more_than_tensors_is_refused_with_what_to_do(tmp_path):
    torch.save({"state_dict": {}, "meta": check}, tmp_path / "code.pth")
    with pytest.raises(
        ValueError, match=r"code.pth: .* holds more than tensors .* weights_only=False\)\['state_dict'\]"
    ):
        import_checkpoint(tmp_path / "code.pth", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file; fetch a checkpoint of ReResNet-50"):
        import_checkpoint(tmp_path / "none.pth", tmp_path)


def test_the_name_of_a_network_is_refused_where_the_file_says_it(tmp_path, capsys):
    assert main(["import", "redet", "file", "--model", "resnet50", "--out", str(tmp_path)]) != 0
    assert "--model is 'resnet50', but a file of ReDet says itself" in capsys.readouterr().err


def test_the_tag_gives_redets_widths_and_basis(monkeypatch):
    monkeypatch.undo()
    model = timm.create_model("c8_resnet50.redet", num_classes=7)
    widths = [level["num_chs"] for level in model.feature_info]
    assert widths == [64, 256, 512, 1024, 2048]  # as many channels as of the plain network: an eighth of the fields
    assert model.num_features == 2048
    assert model.layer1[0].conv2.weight.shape == (8, 8, 8, 8)
    assert model.fc.weight.shape == (7, 256)
