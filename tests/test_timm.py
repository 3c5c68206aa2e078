"""What a timm user does with a model works on an equivariant one, and leaves it invariant."""

import copy
import functools
import io
import pickle
import warnings

import PIL.Image
import pytest
import timm
import torch
import torch.multiprocessing as mp
from timm.data import create_transform, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import gzoo
from gzoo.check import in_channels, relative_error
from gzoo.convert import convert_in_place, randomized
from gzoo.equivariant import EquivariantClassifier
from gzoo.nn import FibreNorm
from tests.conftest import shallow, with_random_statistics

OWN = ("p4m_resnet20", "p4_allcnnc", "p4m_cnn7")
TIMM = ("p4m_resnet18", "p4_resnet50", "p4_convnext_atto")
FAMILIES = ("p4m_cnn7", "p4_resnet18", "p4m_convnext_atto")
FEW = ("p4m_resnet20", "p4_convnext_atto")


@functools.cache
def _random(name: str, options: tuple) -> nn.Module:
    torch.manual_seed(0)
    return with_random_statistics(timm.create_model(name, **dict(options))).eval()


def random_model(name: str, **options) -> nn.Module:
    """A float64 model in eval mode whose norms, biases and layer scales are random; timm's have a block a stage."""
    return copy.deepcopy(_random(name, tuple((shallow(name) | options).items())))


def random_images(model: nn.Module, size: int = 32, batch: int = 1) -> Tensor:
    return torch.randn(batch, in_channels(model), size, size, dtype=next(model.parameters()).dtype)


def smallest(model: nn.Module) -> int:
    """Pixels of a small odd image that the model takes."""
    return {"EquivariantConvNeXt": 33, "EquivariantStagedCNN": 9}.get(type(model).__name__, 17)


def worst_change(f, model: nn.Module) -> float:
    """How much the vectors f(x) change when x is turned or reflected."""
    group = model.group
    x = random_images(model, 29 if in_channels(model) == 1 else smallest(model))
    with torch.no_grad():
        y = f(x)
        return max(relative_error(f(group.transform_image(x, g)), y) for g in range(1, group.order))


# Features


@pytest.mark.parametrize("name", OWN + TIMM)
def test_feature_info_has_the_channels_and_reductions_of_the_features(name):
    model = timm.create_model(name, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    coarsest = max(reductions)
    with torch.no_grad():
        small, large = (model(random_images(model, size)) for size in (64, 64 + coarsest))
    assert [y.shape[1] for y in small] == channels
    assert all(count % model.model.group.order == 0 for count in channels)
    for y, z, reduction in zip(small, large, reductions, strict=True):
        # What an unpadded network loses at the border, it loses at both sizes.
        assert z.shape[-1] - y.shape[-1] == coarsest / reduction
        assert y.shape[-1] == 64 // reduction or "cnn7" in name


@pytest.mark.parametrize("name", OWN[:2] + TIMM)
def test_features_of_odd_images_have_the_size_that_plain_features_have(name):
    model = timm.create_model(name, features_only=True).eval()
    plain = timm.create_model(name.split("_", 1)[1], features_only=True).eval()
    x = random_images(model, 65)
    with torch.no_grad():
        assert [y.shape[2:] for y in model(x)] == [y.shape[2:] for y in plain(x)]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_features_transform_with_the_image(name):
    model = timm.create_model(name, features_only=True)
    report = gzoo.check(with_random_statistics(model), 33)
    assert len(report.errors) == len(model.feature_info)
    assert report.worst < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("indices", [(1,), (0, -1), (-2,), 2])
def test_out_indices_select_features(name, indices):
    everything = random_model(name, features_only=True)
    some = random_model(name, features_only=True, out_indices=indices)
    some.load_state_dict(everything.state_dict(), strict=False)
    x = random_images(everything)
    with torch.no_grad():
        features, expected = some(x), everything(x)
    wanted = (-2, -1) if indices == 2 else indices
    assert len(features) == len(wanted)
    for y, i in zip(features, wanted, strict=True):
        torch.testing.assert_close(y, expected[i])
    assert some.feature_info.channels() == [y.shape[1] for y in features]


def test_features_take_the_state_of_a_classifier_also_within_another_network():
    name = "p4m_resnet18"
    classifier, features = (random_model(name, **options) for options in ({}, {"features_only": True}))
    detector = nn.ModuleDict({"backbone": copy.deepcopy(features)})
    prefixed = {f"backbone.{key}": value for key, value in classifier.state_dict().items()}
    x = random_images(classifier)
    expected = classifier.forward_intermediates(x, intermediates_only=True)
    for model, whole, state in (
        (features, features, classifier.state_dict()),
        (detector["backbone"], detector, prefixed),
        (features, features, features.state_dict()),
    ):
        assert not whole.load_state_dict(state, strict=False).missing_keys
        assert all(torch.equal(y, z) for y, z in zip(model(x), expected, strict=True))
    with pytest.raises(ValueError, match="of a p4 network in the pixel basis, but the model is a p4m network"):
        features.load_state_dict(random_model("p4_resnet18").state_dict(), strict=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_need_no_global_pool(name):
    assert timm.create_model(name, features_only=True, global_pool="")


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_give_the_features_that_the_getter_gives(name):
    by = {kind: random_model(name, features_only=True, feature_cls=kind) for kind in ("hook", "getter")}
    by["hook"].body.load_state_dict(by["getter"].model.state_dict(), strict=False)  # which keeps a head
    x = random_images(by["getter"], 64)
    for y, expected in zip(by["hook"](x), by["getter"](x), strict=True):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_gives_the_features_of_the_model_it_was_traced_from(name):
    model = random_model(name)
    nodes = [level["module"] for level in model.feature_info]
    graph = create_feature_extractor(model, nodes)
    x = random_images(model, 33)
    expected = model.forward_intermediates(x, intermediates_only=True)
    for node, y in zip(nodes, expected, strict=True):
        torch.testing.assert_close(graph(x)[node], y)
    assert gzoo.check(graph, 33).worst < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_its_parts(name):
    model = random_model(name)
    x = random_images(model)
    features = model.forward_features(x)
    last, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.forward_head(last), model(x))
    torch.testing.assert_close(last, features)
    assert features.shape[1] == model.num_features == intermediates[-1].shape[1]


# Heads


POOLS = ("avg", "max", "avgmax", "catavgmax", "fastmax", "fastcatavgmax")


@pytest.mark.parametrize("name", FAMILIES)
def test_pre_logits_are_invariant_vectors(name):
    model = random_model(name)
    x = random_images(model)
    vectors = model.forward_head(model.forward_features(x), pre_logits=True)
    assert vectors.shape == (1, model.head_hidden_size)
    assert worst_change(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), model) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_without_classes_the_model_gives_the_pre_logits(name):
    model = random_model(name)
    headless = random_model(name, num_classes=0)
    headless.load_state_dict(model.state_dict(), strict=False)
    x = random_images(model)
    torch.testing.assert_close(headless(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert headless(x).shape == (1, headless.head_hidden_size)
    assert headless.num_classes == 0


def test_features_before_group_pooling_are_not_invariant():
    # The negative control of this file: spatial pooling alone leaves a fibre that turns.
    model = random_model("p4_resnet20")
    assert worst_change(lambda x: model.forward_features(x).mean((2, 3)), model) > 0.01


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pool", POOLS)
def test_every_global_pool_gives_invariant_vectors(name, pool):
    if "convnext" in name and "cat" in pool:
        pytest.skip("timm's own ConvNeXt refuses a pooling that changes the width")
    model = random_model(name, global_pool=pool, num_classes=0)
    assert model(random_images(model)).shape == (1, model.head_hidden_size)
    assert worst_change(model, model) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_without_global_pool_the_model_gives_regular_fields(name):
    model = random_model(name, global_pool="", num_classes=0)
    assert model(random_images(model)).shape[1] == model.num_features
    group, x = model.group, random_images(model, 33)
    y = model(x)
    for g in range(group.order):
        assert relative_error(model(group.transform_image(x, g)), group.transform_features(y, g)) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_reset_classifier_gives_a_new_invariant_classifier(name):
    model = random_model(name)
    hidden = model.head_hidden_size
    for num_classes in (7, 0, 3):
        model.reset_classifier(num_classes)
        assert (model.num_classes, model.head_hidden_size) == (num_classes, hidden)
        assert model(random_images(model)).shape == (1, num_classes or hidden)
        assert worst_change(model, model) < 1e-12


# Their own ways to make a classifier: a timm.layers.Linear, a head that looks at the layer before it, norms before the
# linear layer, two classifiers in one module or beside each other, a convolution.
HEADS = {
    "ghostnet_050": {},
    "mobilenetv3_small_050": {},
    "shvit_s1": {"depth": (1, 1, 1)},
    "repvit_m0_9": {"embed_dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)},
    "swiftformer_xs": {"layers": (1, 1, 1, 1)},
    "dla46_c": {},
}


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_classifier_is_reset_to_an_invariant_one(name):
    model = convert_in_place(timm.create_model(name, num_classes=7, **HEADS[name]), "p4")
    for num_classes in (0, 5):
        model.reset_classifier(num_classes)
        probe, x = randomized(model)
        y = probe(x)
        assert y.shape == (1, num_classes or model.head_hidden_size)
        assert relative_error(probe(x.rot90(1, (2, 3))), y) < 1e-9
        assert relative_error(probe(x.roll(1, 1) * 2), y) > 1e-6
    without = convert_in_place(timm.create_model(name, num_classes=0, **HEADS[name]), "p4").eval()
    assert without(x.float()).shape == (1, model.head_hidden_size)


def test_a_hidden_layer_that_would_change_its_kind_is_refused():
    model = convert_in_place(timm.create_model("test_convnext", head_hidden_size=32), "p4")
    before = str(model)
    with pytest.raises(
        ValueError, match=r"global_pool='' would exchange the hidden layer .* create the model with global_"
    ):
        model.reset_classifier(5, "")
    assert str(model) == before
    model.reset_classifier(5, "max")
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_a_new_classifier_of_unknown_layers_is_named():
    model = timm.create_model("p4_resnet20")
    bilinear = {"reset_classifier": lambda self, n, pool: setattr(self.head, "fc", nn.Bilinear(2, 2, n))}
    model.__class__ = type("Other", (EquivariantClassifier, type("Plain", (nn.Module,), bilinear)), {})
    model.get_classifier = lambda: nn.Identity()
    with pytest.raises(ValueError, match=r"^head\.fc, of the new classifier, is a Bilinear: gzoo knows linear layers"):
        model.reset_classifier(3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pool", POOLS[:4])
def test_reset_classifier_changes_the_global_pool(name, pool):
    if "convnext" in name and pool == "catavgmax":
        pytest.skip("timm's own ConvNeXt refuses a pooling that changes the width")
    model, created = random_model(name), random_model(name, global_pool=pool, num_classes=4)
    model.reset_classifier(4, pool)
    assert model.head_hidden_size == created.head_hidden_size
    assert model.get_classifier().weight.shape == created.get_classifier().weight.shape
    assert worst_change(model, model) < 1e-12
    model.reset_classifier(0)
    assert model(random_images(model)).shape == (1, created.head_hidden_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_reset_classifier_pools_over_the_group_as_before(name):
    model = timm.create_model(name)
    before = model.get_classifier().group_pool.pool
    model.reset_classifier(3)
    assert model.get_classifier().group_pool.pool == before == ("max" if "cnn7" in name else "mean")


def test_reset_classifier_keeps_device_dtype_and_mode():
    model = timm.create_model("p4_cnn7").double().eval()
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.float64
    assert not model.get_classifier().training


@pytest.mark.parametrize("name", ["p4m_resnet20", "p4_resnet18", "p4m_convnext_atto"])
@pytest.mark.parametrize("pre_logits", [False, True])
def test_a_head_that_is_put_in_the_classifiers_place_is_given_invariant_features(name, pre_logits):
    model = random_model(name)
    path, width = model.pretrained_cfg["classifier"], model.get_classifier().in_features
    model.set_submodule(path, nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 3)).double())

    def logits(x):
        return model.forward_head(model.forward_features(x), pre_logits) if pre_logits else model(x)

    assert logits(random_images(model)).shape == (1, width if pre_logits else 3)
    assert worst_change(logits, model) < 1e-12
    model.set_submodule(path, nn.Linear(model.num_features, 3).double())
    message = (
        rf"^the Linear in the classifier's place takes {model.num_features} features; pooled .* are {width}\. model"
    )
    with pytest.raises(ValueError, match=message):
        model(random_images(model))


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("p4m_resnet20", {"num_classes": 0}, lambda width: nn.Linear(width, 3)),
        ("p4m_resnet20", {}, lambda width: OwnLinear(width, 3)),
        (
            "p4_resnetv2_50",
            {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)},
            lambda width: nn.Conv2d(width, 3, 1),
        ),
    ],
)
def test_any_head_is_given_invariant_features(name, options, head):
    model = random_model(name, **options)
    model.set_submodule(model.pretrained_cfg["classifier"], head(model.head_hidden_size).double())
    assert model(random_images(model)).shape == (1, 3)
    assert worst_change(model, model) < 1e-12


def test_a_parametrized_classifier_stays_the_networks_own():
    model = random_model("p4_resnet20", num_classes=3, head="pose")
    x = random_images(model)
    expected = model(x)
    torch.nn.utils.parametrizations.weight_norm(model.get_classifier())
    torch.testing.assert_close(model(x), expected)


def test_a_classifier_for_every_pixel_is_invariant_where_it_stands():
    model = random_model("p4_convnext_atto")
    model.reset_classifier(3, "")
    group, x = model.group, random_images(model, 64)
    for g in range(group.order):
        assert relative_error(model(group.transform_image(x, g)), group.transform_image(model(x), g)) < 1e-12


# Options


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_model_takes_any_number_of_input_channels(name, channels):
    model = timm.create_model(name, in_chans=channels, num_classes=2).eval()
    assert model(torch.randn(1, channels, 32, 32)).shape == (1, 2)
    assert model.in_chans == channels


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_rate_drops_before_the_classifier_in_training_only(name):
    model = timm.create_model(name, drop_rate=0.5).eval()
    x = random_images(model)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize("name", ["p4m_resnet20", "p4_resnet18", "p4m_convnext_atto"])
def test_drop_path_rate_drops_blocks_in_training_only(name):
    model = timm.create_model(name, drop_path_rate=0.9, num_classes=4)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.9)
    model = with_random_statistics(model).eval()
    x = random_images(model)
    assert torch.equal(model(x), model(x))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        assert len({model(x).sum().item() for _ in range(4)}) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_grad_checkpointing_gives_the_same_gradient(name):
    model = random_model(name)
    x = random_images(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# Optimizers


def layer_of(model: nn.Module) -> dict[str, int]:
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {name: int(layer) for name, layer in groups.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_group_matcher_puts_every_parameter_into_a_layer_in_order(name):
    model = timm.create_model(name)
    layers = layer_of(model)
    assert layers.keys() == {name for name, _ in model.named_parameters()}
    config = model.pretrained_cfg
    first, head = config["first_conv"] + ".weight", config["classifier"] + ".weight"
    assert layers[first] == 0
    assert layers[head] == max(layers.values()) >= 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_group_matcher_groups_as_that_of_the_plain_network(name):
    plain = layer_of(timm.create_model(name.split("_", 1)[1]))
    own = {
        key.replace(".norm.weight", ".weight").replace(".norm.bias", ".bias"): layer
        for key, layer in layer_of(timm.create_model(name)).items()
    }
    plain = {
        key.replace(".norm.weight", ".weight").replace(".norm.bias", ".bias"): layer for key, layer in plain.items()
    }
    assert own == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_scales_the_learning_rate_from_the_stem_to_the_head(name):
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.7)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    config = model.pretrained_cfg
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.get_submodule(config["classifier"]).weight)] == 1
    assert scale[id(model.get_submodule(config["first_conv"]).weight)] == min(scale.values()) < 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_biases_are_not_decayed(name):
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        vector = "norm" in key or "bn" in key or key.endswith(("bias", "gamma")) or ".1.weight" in key
        assert (decay[id(parameter)] == 0) == (parameter.ndim == 1), key
        if parameter.ndim > 1:
            assert key.endswith("weight")
        else:
            assert vector or "downsample" in key, key


def test_an_average_of_the_weights_follows_the_model():
    model = timm.create_model("p4_cnn7")
    ema = ModelEmaV3(model, decay=0.5)
    before = model.stem[0].weight.detach().clone()
    with torch.no_grad():
        model.stem[0].weight.add_(1)
    ema.update(model)
    torch.testing.assert_close(ema.module.stem[0].weight, before + 0.5)
    assert ema.module.eval()(random_images(model, 28)).shape == (1, 10)
    assert torch.equal(ema.module.group_signature, model.group_signature)
    assert worst_change(ema.module, ema.module) < 1e-5


# Copies


def copied(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_gives_the_same_and_lives_on_its_own(name, how):
    model = random_model(name)
    x = random_images(model)
    expected = model(x)  # fills the caches of the filters
    again = copied(model, how)
    assert torch.equal(again(x), expected)
    assert type(again) is type(model)
    assert again.group == model.group
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.1)
    assert torch.equal(model(x), expected)
    assert not torch.equal(again(x), expected)
    again.reset_classifier(3)
    assert again(x).shape == (1, 3)


# Numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_autocast_trains(name):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=4)
    x = random_images(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", FEW)
def test_bf16_autocast_is_near_float32(name):
    model = random_model(name).float()
    x = random_images(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert 0 < relative_error(rounded.float(), model(x)) < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_gives_the_same_numbers(name):
    model = random_model(name)
    x = random_images(model)
    y = model(x)
    y.sum().backward()
    gradient = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)
    last = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y)
    last.sum().backward()
    for parameter, expected in zip(model.parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("name", FEW)
def test_half_precision_weights_run(name):
    model = timm.create_model(name).to(torch.bfloat16).eval()
    assert model(random_images(model)).isfinite().all()


# Many processes


def _gradients(rank: int, path: str) -> None:
    """One of two processes: each model's gradient of its half of the batch, averaged by DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}.store", rank=rank, world_size=2)
    models, images = torch.load(path, weights_only=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in models:
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel(images[rank::2]).square().mean().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in models.parameters()], path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    # In eval mode: the statistics of two half batches differ.
    plain, pool = (random_model("cnn7", num_classes=classes) for classes in (4, 1))
    native = [random_model(name, num_classes=4) for name in ("p4_cnn7", "c8_cnn7")]
    models = nn.ModuleList([*native, gzoo.equivarify(plain, "p4", pool=pool)])  # in one go: processes start slowly
    images = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    path = str(tmp_path / "models.pt")
    torch.save((models, images), path)
    mp.start_processes(_gradients, (path,), nprocs=2, start_method="forkserver")
    for model in models:
        model(images).square().mean().backward()
    for parameter, gradient in zip(models.parameters(), torch.load(path), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("conversion", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
@pytest.mark.parametrize("name", ["p4m_resnet20", "p4_resnet18"])
def test_sync_batch_norm_conversion_reaches_every_norm(name, conversion):
    model = random_model(name)
    x = random_images(model)
    expected, keys = model(x), list(model.state_dict())
    converted = conversion(copy.deepcopy(model))
    norms = [module for module in converted.modules() if isinstance(module, FibreNorm)]
    assert norms
    assert all(isinstance(norm.norm, nn.SyncBatchNorm) for norm in norms)
    torch.testing.assert_close(converted(x), expected)
    assert list(converted.state_dict()) == keys
    assert converted.group == model.group


# Data


@pytest.mark.parametrize(
    ("name", "size"), [("p4_cnn7", (1, 28, 28)), ("p4m_resnet20", (3, 32, 32)), ("p4_resnet18", (3, 224, 224))]
)
def test_the_data_config_is_that_of_the_data(name, size):
    config = resolve_model_data_config(timm.create_model(name))
    assert config["input_size"] == size


@pytest.mark.parametrize("name", ["p4_cnn7", "p4m_resnet20"])
def test_the_transform_of_the_data_config_makes_an_image_for_the_model(name):
    model = timm.create_model(name).eval()
    channels, *size = model.pretrained_cfg["input_size"]
    image = PIL.Image.new("L" if channels == 1 else "RGB", (50, 40))
    x = create_transform(**resolve_model_data_config(model))(image)
    assert x.shape == (channels, *size)
    assert model(x[None]).shape == (1, 10)


# What is wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_channel_count_is_named(name):
    model = timm.create_model(name).eval()
    channels = in_channels(model) + 1
    with pytest.raises(ValueError, match=rf"not \(B, {channels - 1}, H, W\).*in_chans={channels}"):
        model(torch.randn(1, channels, 32, 32))


@pytest.mark.parametrize(("name", "size"), [("p4_cnn7", 20), ("p4m_cnn7", 2), ("p4_convnext_atto", 3)])
def test_an_image_that_is_too_small_is_named(name, size):
    model = timm.create_model(name).eval()
    with pytest.raises(ValueError, match=r"a map of \d+x\d+ pixels is too small for a window of .*larger image"):
        model(random_images(model, size))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_without_a_batch_is_named(name):
    model = timm.create_model(name).eval()
    with pytest.raises(ValueError, match=r"the image has shape \(\d, 32, 32\), not \(B, "):
        model(random_images(model)[0])


# Networks that the zoo does not list


@pytest.fixture(scope="module")
def own_network():
    torch.manual_seed(0)
    return gzoo.convert(timm.create_model("resnet10t", num_classes=5), "p4")


def test_convert_keeps_the_data_config_and_drops_the_source_of_the_plain_weights(own_network):
    plain, config = timm.create_model("resnet10t").pretrained_cfg, own_network.pretrained_cfg
    for key in ("input_size", "mean", "std", "first_conv", "classifier"):
        assert config[key] == plain[key]
    assert plain["hf_hub_id"]
    assert not {"hf_hub_id", "url", "file"} & {key for key, value in config.items() if value}
    assert config["architecture"] == "p4_resnet10t"
    assert own_network.default_cfg is config


def test_convert_leaves_the_plain_model_alone():
    plain = timm.create_model("cnn7")
    before = plain.pretrained_cfg.copy()
    gzoo.convert(plain, "p4")
    assert plain.pretrained_cfg == before
    assert type(plain).__name__ == "StagedCNN"


def test_a_converted_network_resets_its_classifier(own_network):
    model = with_random_statistics(own_network).eval()
    model.reset_classifier(3)
    assert worst_change(model, model) < 1e-12


def test_a_converted_network_gives_intermediates(own_network):
    report = gzoo.check(with_random_statistics(own_network), 40)
    assert list(report.errors) == [*(f"stage {i}" for i in range(5)), "logits"]
    assert report.worst < 1e-12


def test_a_converted_network_reloads_its_state(own_network):
    torch.manual_seed(1)
    other = gzoo.convert(timm.create_model("resnet10t", num_classes=5), "p4").eval()
    x = random_images(other)
    own = copy.deepcopy(own_network).eval()
    assert not torch.equal(other(x), own(x))
    other.load_state_dict(own_network.state_dict())
    assert torch.equal(other(x), own(x))


def test_a_converted_network_refuses_the_checkpoint_of_another(own_network):
    with pytest.raises(ValueError, match="of a p4m network in the pixel basis, but the model is a p4 network"):
        own_network.load_state_dict(convert_in_place(timm.create_model("resnet10t"), "p4m").state_dict())
    with pytest.raises(ValueError, match="of a plain network"):
        own_network.load_state_dict(timm.create_model("resnet10t", num_classes=5).state_dict())


def test_a_plain_module_converts_without_timms_calls():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model = gzoo.convert(plain, "p4m").eval()
    again = copied(model, "pickle")
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(again(x), model(x))
    assert again.group_name == "p4m"
