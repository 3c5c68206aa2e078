"""Partial networks start with the whole group, are exact for what they keep, and are saved, shown and refused."""

import copy

import pytest
import timm
import torch
from timm.models import metaformer, save_for_hf
from torch import nn

import gzoo
from gzoo import backbones, groups
from gzoo.cli import main
from gzoo.mnist6 import mnist6, pairs
from gzoo.partial import subsets, symmetry
from tests.conftest import random_image, with_random_statistics, without


def small(norm=nn.BatchNorm2d, last=()):
    """A norm behind the first convolution, none behind the second."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    first = [nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(16, 16, 3, stride=2), *last, nn.ReLU(), *head)


def partial_resnet(group="p4"):
    """A residual network with random statistics, in eval mode, which keeps the whole group."""
    plain = timm.create_model("resnet18", channels=(8, 8, 16, 16), stem_width=8, num_classes=5)
    return keeping(with_random_statistics(gzoo.convert(plain, group, partial=True)).eval(), range(100))


REPVGG = timm.models.ByoModelCfg(
    blocks=tuple(timm.models.ByoBlockCfg("rep", d=2, c=8, s=s) for s in (2, 1)),
    stem_type="rep",
    stem_chs=8,
)
NETWORKS = {  # norms of sums, of concatenations, of the image's shortcut, over channels in either order; linear maps
    "wide_resnet": lambda: backbones.wide_resnet(10, 1, num_classes=5),
    "resnetv2": lambda: timm.create_model("resnetv2_18", channels=(8, 8, 16, 16), stem_chs=8, num_classes=5),
    "densenet": lambda: timm.models.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=5),
    "convnext": lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5),
    "convnextv2": lambda: timm.models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), use_grn=True, conv_mlp=True, ls_init_value=None, num_classes=5
    ),
    "poolformer": lambda: metaformer.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(8, 8, 16, 16),
        token_mixers=metaformer.Pooling,
        mlp_act=nn.GELU,
        mlp_bias=True,
        downsample_norm=None,
        norm_layers=timm.layers.GroupNorm1,
        use_mlp_head=False,
        num_classes=5,
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        *list(small())[4:],
    ).insert(3, nn.Conv2d(8, 16, 3)),
    "repvgg": lambda: timm.models.ByobNet(REPVGG, num_classes=5),
}


def keeping(model, kept):
    for _, subset in subsets(model):
        subset.keep(set(kept) & set(range(subset.group.order)))
    return model


def test_each_convolution_has_one_subset_in_its_norm_or_behind_it():
    model = gzoo.convert(small(), "p4", partial=True)
    assert [name for name, _ in subsets(model)] == ["1", "3"]
    assert [name for name, _ in subsets(gzoo.convert(small(), "p4"))] == []


@pytest.mark.parametrize("channels", [3, 4])  # 4: as many as p4 has elements
def test_a_norm_of_the_image_drops_nothing(channels):
    plain = nn.Sequential(timm.layers.LayerNorm2d(channels), nn.Conv2d(channels, 16, 3, padding=1), *list(small())[1:])
    assert [name for name, _ in subsets(gzoo.convert(plain, "p4", partial=True))] == ["2", "4"]


def test_a_gate_drops_nothing_as_it_multiplies_zeros():
    model = gzoo.convert(timm.create_model("legacy_seresnet18", layers=(1, 1, 1, 1)), "p4", partial=True)
    gates = {name.rpartition(".")[2] for name, _ in subsets(model) if "se_module" in name}
    assert gates == {"fc1"}  # fc2 sums over what that gives


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_a_norm_drops_for_the_convolution_before_it_in_either_memory_layout(conv_mlp):
    plain = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=conv_mlp)
    found = {name.rpartition("blocks.0.")[2] for name, _ in subsets(gzoo.convert(plain, "p4", partial=True))}
    assert {name for name in found if not name.startswith(("s", "head"))} == {"norm", "mlp.fc1", "mlp.fc2"}


def test_what_training_may_turn_from_zero_counts():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.inner = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
            self.scale, self.last = timm.layers.LayerScale2d(16, 0.0), nn.Conv2d(16, 16, 3)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

        def forward(self, x):
            x = self.norm(self.first(x)).relu()
            return self.head(self.last(x + self.scale(self.inner(x))))

    assert [name for name, _ in subsets(gzoo.convert(Scaled(), "p4", partial=True))] == ["norm", "inner", "last"]


def test_the_last_convolution_of_a_feature_extractor_has_a_subset():
    features = nn.Sequential(*list(small())[:-3])
    assert [name for name, _ in subsets(gzoo.convert(features, "p4", partial=True, classifier=""))] == ["1", "3"]


def test_the_network_may_return_more_than_one_tensor_of_any_shape():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small()

        def forward(self, x):
            y = self.layers(x)
            return {"out": y[:, 0], "more": [y, None]}

    model = gzoo.convert(Regression(), "p4", partial=True)
    assert [name for name, _ in subsets(model)] == ["layers.1", "layers.3"]


@pytest.mark.parametrize("size", [64, 65, (48, 65)])
@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_a_partial_network_starts_as_the_fully_equivariant_one(group, size):
    model = with_random_statistics(gzoo.convert(small(), group, partial=True)).eval()
    keeping(model, range(8))
    report = gzoo.check(model, size)
    assert report.worst < 1e-12
    assert not report.given_up
    x = random_image(3, (size, size) if isinstance(size, int) else size)
    assert model(x).equal(without(model, "subset")(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_whose_norms_follow_no_convolution_are_exact_for_what_they_keep_too(name):
    model = with_random_statistics(gzoo.convert(NETWORKS[name](), "p4m", partial=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales and GRN's numbers start next to zero
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    x = random_image(3, (48, 33))
    assert keeping(model, range(8))(x).allclose(without(model, "subset")(x), rtol=1e-12)
    report = gzoo.check(keeping(model, (0, 2, 4, 6)), (48, 33))
    assert tuple(report.errors["logits"]) == (0, 2, 4, 6)
    assert report.worst < 1e-12 < 1e-6 < min(report.given_up.values())


@pytest.mark.parametrize(
    ("group", "kept", "size"),
    [("p4", (0, 2), 64), ("p4m", (0, 2, 4, 6), (65, 48)), ("p4m", (0, 5), 64), ("d2", (0,), (65, 48))],
)
def test_a_residual_network_that_keeps_a_subgroup_is_exact_for_it_and_for_no_more(group, kept, size):
    report = gzoo.check(keeping(partial_resnet(group), kept), size)
    assert tuple(report.errors["logits"]) == kept
    assert report.worst < 1e-12
    assert set(report.given_up) == set(range(report.group.order)) - set(kept)
    assert min(report.given_up.values()) > 1e-6


def test_a_subgroup_that_is_kept_can_be_asked_for():
    model = keeping(partial_resnet("p4m"), (0, 4))  # the reflection, which d1 calls 1
    assert gzoo.check(model, 33, "d1").worst < 1e-12
    assert gzoo.check(model, 33, "p4").worst > 1e-6


def test_maps_show_what_was_given_up():
    model = timm.create_model("p4_resnet20", partial=True, features_only=True)
    assert not gzoo.check(keeping(model, range(4)), 33).given_up
    report = gzoo.check(keeping(model, (0, 2)), 33)
    assert report.worst < 1e-12 < 1e-6 < min(report.given_up.values())
    assert set(report.given_up) == {1, 3}


def test_off_the_grid_the_turns_on_the_grid_stay_exact():
    model = with_random_statistics(gzoo.convert(small(), "c8", partial=True)).eval()
    report = gzoo.check(keeping(model, (0, 4)), 33)
    assert tuple(report.errors["logits"]) == (0, 4)
    assert report.worst < 1e-12 < min(report.given_up.values())


def test_layers_keep_in_common_what_the_network_keeps():
    model = gzoo.convert(small(), "p4m", partial=True)
    (_, first), (_, second) = subsets(model)
    first.keep((0, 1, 2, 3))
    second.keep((0, 2, 4, 6))
    assert symmetry(model) == (0, 2)


def test_subsets_have_a_learning_rate_of_their_own_and_no_decay():
    model = gzoo.convert(small(), "p4", partial=True)
    weights, logits = gzoo.partial.parameter_groups(model, 1e-3, 5e-2)
    assert (weights["lr"], logits["lr"], logits["weight_decay"]) == (1e-3, 5e-2, 0)
    assert [id(logit) for logit in logits["params"]] == [id(subset.logits) for _, subset in subsets(model)]
    assert {id(p) for p in weights["params"] + logits["params"]} == {id(p) for p in model.parameters()}
    (only,) = gzoo.partial.parameter_groups(without(model, "subset"), 1e-3, 5e-2)
    assert len(only["params"]) == len(weights["params"])


@pytest.mark.parametrize("name", ["p4_cnn7", "p4m_cnn7", "p4_resnet20"])
def test_entries_take_partial_and_train(name):
    model = timm.create_model(name, partial=True, num_classes=3)
    channels, *size = model.pretrained_cfg["input_size"]
    model(torch.randn(2, channels, *(min(side, 32) for side in size))).sum().backward()
    assert all(subset.logits.grad is not None for _, subset in subsets(model))


def test_weights_and_subsets_survive_a_save_a_copy_and_the_check_command(tmp_path, capsys):
    model = keeping(timm.create_model("p4_cnn7", partial=True).eval(), (0, 2))
    other = timm.create_model("p4_cnn7", partial=True).eval()
    other.load_state_dict(model.state_dict())
    save_for_hf(model, str(tmp_path), model_args={"partial": True}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 28, 28)
    for twin in (other, loaded, copy.deepcopy(model)):
        assert twin(x).equal(model(x))
        assert symmetry(twin) == (0, 2)
    assert main(["check", str(tmp_path), "--size", "28"]) == 0
    assert "given up" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"subset\.logits is not in the model"):
        timm.create_model("p4_cnn7").load_state_dict(model.state_dict())


def test_the_report_shows_what_each_layer_keeps(tmp_path):
    model = keeping(gzoo.convert(small(), "p4", partial=True), (0, 2))
    assert gzoo.partial.report(model).splitlines() == [
        "kept elements of p4",
        "layer        0       90      180      270   |S|",
        "1        1.00    (0.12)    0.88    (0.12)     2",
        "3        1.00    (0.12)    0.88    (0.12)     2",
        "all layers together: exactly equivariant to 0, 180",
    ]
    gzoo.partial.plot(model, tmp_path / "subsets.png")
    assert (tmp_path / "subsets.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("plain", "options", "message"),
    [
        (small(), {"group": "p4", "group_pool": "max"}, "needs group_pool='mean'"),
        (small(), {"group": "c1"}, "c1 has no element beside the identity"),
        (small(nn.InstanceNorm2d), {"group": "p4", "weights": "transfer"}, "1 normalises each element by itself"),
        (small(last=[nn.Softplus()]), {"group": "p4"}, r"would see dropped .* f\(0\) != 0"),
        (small(last=[metaformer.StarReLU()]), {"group": "p4"}, r"would see dropped .* f\(0\) != 0"),
    ],
)
def test_what_would_bring_dropped_elements_back_is_refused(plain, options, message):
    with pytest.raises(ValueError, match=message):
        gzoo.convert(plain, partial=True, **options)


def test_networks_without_partial_layers_are_named():
    with pytest.raises(ValueError, match="cnn7 is a plain network; partial=True is for those over a group, p4_cnn7"):
        timm.create_model("cnn7", partial=True)
    with pytest.raises(ValueError, match="has no partial layers; create it with partial=True"):
        gzoo.partial.report(gzoo.convert(small(), "p4"))
    with torch.device("meta"), pytest.raises(ValueError, match="runs the network, which the meta device cannot"):
        timm.create_model("p4_cnn7", partial=True)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside torch\.inference_mode"):
        timm.create_model("p4_cnn7", partial=True)
    with pytest.raises(ValueError, match="is partial: escnn has no fields"):
        gzoo.to_escnn(gzoo.convert(small(), "p4", partial=True))


def test_a_six_and_its_copy_look_alike_to_a_full_network_only():
    group, images = groups.get("p4"), random_image(1, (28, 28), batch=3)
    x, y = pairs(images, group, 2)
    assert x[3:].equal(x[:3].rot90(2, (2, 3)))
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    model = keeping(with_random_statistics(gzoo.convert(backbones.cnn7(num_classes=2), group, partial=True)), range(4))
    model.eval()
    assert model(x)[:3].allclose(model(x)[3:], rtol=1e-10)
    assert not keeping(model, (0, 1))(x)[:3].allclose(model(x)[3:], rtol=1e-3)


def test_mnist6_names_data_without_sixes(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as pillow

    rows = {"image": [pillow.new("L", (28, 28))] * 2, "label": [0, 1]}
    features = Features({"image": Image(), "label": ClassLabel(names=["0", "1"])})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no train image has the class '6'; its classes are 0, 1"):
        mnist6(str(tmp_path))


def test_a_partial_network_starts_from_the_weights_of_its_equivariant_twin():
    x = torch.randn(2, 3, 32, 32)
    full, partial = (timm.create_model("p4m_resnet20", pretrained=True, partial=p).eval() for p in (False, True))
    assert partial(x).allclose(full(x), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"pools a fibre .*, which may drop elements, pools by mean, which makes other"
    ):
        timm.create_model("p4_cnn7", pretrained=True, partial=True)
