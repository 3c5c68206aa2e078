"""Where weights come from, and what a checkpoint that does not fit is told."""

import hashlib
import json

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from timm.models import generate_default_cfgs, register_model
from timm.models._hub import save_for_hf
from timm.models._registry import _clear_model_entries, _model_entrypoints
from torch import nn

import gzoo
from gzoo import groups, registry, weights
from gzoo.equivariant import SIGNATURE, make_equivariant
from gzoo.nn import LiftingConv2d
from gzoo.registry import Entry
from tests import fresh

NAME = "p4_cnn7"


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"])[..., :32, :32]


def saved(model: nn.Module, folder, name: str = "model.safetensors") -> str:
    """The path of a file that holds the model's state_dict."""
    path = str(folder / name)
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def from_file(name: str, path: str, **kwargs) -> nn.Module:
    overlay = {"file": path, **kwargs.pop("overlay", {})}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """A folder of model cards of its own."""
    folder = tmp_path / "model_cards"
    folder.mkdir()
    monkeypatch.setattr(weights, "_CARD_FOLDERS", (folder,))
    return folder


@pytest.fixture
def register():
    """Registers an entry for one test."""
    names = []

    def add(entry: Entry) -> str:
        factory = registry._factory(entry.name, entry)
        setattr(registry, entry.name, factory)
        registry.default_cfgs.update(generate_default_cfgs(registry._configs(entry)))
        names.append(entry.name)
        register_model(factory)
        return entry.name

    yield add
    for name in names:
        _clear_model_entries(name)
        del _model_entrypoints[name], registry.default_cfgs[name]
        delattr(registry, name)
        registry.__all__.remove(name)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, an empty cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


# Where weights come from


def card(cards) -> nn.Module:
    """Writes the card of d1_cnn7.data, a random model."""
    model = gzoo.convert(timm.create_model("cnn7"), "d1")
    save_for_hf(
        model,
        cards / "d1_cnn7.data",
        model_config={"label_names": [f"digit {i}" for i in range(10)]},
        data_config={"mean": (0.13,), "std": (0.31,)},
        safe_serialization=True,
    )
    return model


@pytest.mark.parametrize("name", sorted(card.parent.name for card in weights.card_folder().glob("*/config.json")))
def test_every_bundled_card_loads_by_its_name(name, offline):
    model = timm.create_model(name, pretrained=True)
    stored = safetensors.torch.load_file(weights.card_folder() / name / weights.FILENAME)
    values = {key: value for key, value in model.state_dict().items() if key != SIGNATURE}  # an older one says less
    assert all(torch.equal(value, stored[key]) for key, value in values.items())
    assert name in timm.list_pretrained()


def test_bundled_weights_load_without_a_network(cards, register, offline):
    model = card(cards)
    name = register(Entry("d1", "cnn7", weights=("data",)))
    for spelling in (name, f"{name}.data"):
        assert same_weights(timm.create_model(spelling, pretrained=True), model)


def test_the_card_gives_the_data_config_and_the_class_names(cards, register):
    card(cards)
    config = timm.models.get_pretrained_cfg(register(Entry("d1", "cnn7", weights=("data",))))
    assert list(config.mean) == [0.13]
    assert list(config.label_names)[3] == "digit 3"
    assert config.tag == "data"
    assert not config.source


def test_a_registered_name_with_weights_is_listed_as_pretrained(cards, register):
    name = register(Entry("d1", "cnn7", weights=("data", "other")))
    listed = timm.list_models("d1_*", pretrained=True)
    assert listed == [f"{name}.data", f"{name}.other"]
    assert timm.models.get_pretrained_cfg(name).tag == "data"  # the first is the default


def test_an_entry_without_weights_is_not_listed_as_pretrained(cards, register):
    register(Entry("d1", "cnn7"))
    assert "d1_cnn7" in timm.list_models("d1_*")
    assert timm.list_models("d1_*", pretrained=True) == []


def test_weights_that_are_not_bundled_come_from_the_hub(cards, register, monkeypatch):
    asked = []

    def load(hub_id, filename, **kwargs):
        asked.append((hub_id, filename))
        return gzoo.convert(timm.create_model("cnn7"), "d1").state_dict()

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", load)
    timm.create_model(register(Entry("d1", "cnn7", weights=("data",))), pretrained=True)
    assert asked == [("gzoo/d1_cnn7.data", "model.safetensors")]


def test_bundled_weights_come_before_the_hub(cards, register, monkeypatch):
    model = card(cards)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", None)
    assert same_weights(timm.create_model(register(Entry("d1", "cnn7", weights=("data",))), pretrained=True), model)


def test_a_bundled_file_that_was_changed_is_refused(cards, register):
    card(cards)
    folder = cards / "d1_cnn7.data"
    weights.write_pin(folder)
    published = weights.pins()["d1_cnn7.data"].sha256
    name = register(Entry("d1", "cnn7", weights=("data",)))
    timm.create_model(name, pretrained=True)
    changed = saved(timm.create_model("p4_cnn7"), folder)  # another model's: the hash is looked at before the weights
    with pytest.raises(ValueError, match="SHA-256") as raised:
        timm.create_model(name, pretrained=True)
    found = hashlib.sha256((folder / weights.FILENAME).read_bytes()).hexdigest()
    assert all(part in str(raised.value) for part in (changed, f"{found}, not {published}", "Reinstall gzoo"))
    own = saved(gzoo.convert(timm.create_model("cnn7"), "d1"), cards)
    from_file(name, own)  # a file that the caller names is the caller's to trust


def test_a_pin_keeps_its_revision_as_long_as_the_weights_are_the_same(cards):
    card(cards)
    folder = cards / "d1_cnn7.data"
    weights.write_pin(folder, "0123")
    weights.write_pin(folder)
    assert weights.pins()[folder.name].revision == "0123"
    assert weights.pretrained_cfg("d1_cnn7", "data")["hf_hub_id"] == "gzoo/d1_cnn7.data@0123"
    saved(timm.create_model("p4_cnn7"), folder)
    weights.write_pin(folder)
    assert weights.pins()[folder.name].revision == ""


def test_cards_inside_the_package_are_found(tmp_path, monkeypatch):
    package = tmp_path / "gzoo"
    monkeypatch.setattr(weights, "_CARD_FOLDERS", (package / "model_cards", tmp_path / "model_cards"))
    (package / "model_cards").mkdir(parents=True)
    assert weights.card_folder() == package / "model_cards"


def test_cards_beside_the_package_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_CARD_FOLDERS", (tmp_path / "gzoo" / "model_cards", tmp_path / "model_cards"))
    (tmp_path / "model_cards").mkdir(parents=True)
    assert weights.card_folder() == tmp_path / "model_cards"


@pytest.mark.parametrize("name", [NAME, "p4m_resnet20", "resnet20"])
@pytest.mark.parametrize("extension", ["safetensors", "pth"])
def test_checkpoint_path_loads_a_state_dict(tmp_path, name, extension):
    model = timm.create_model(name)
    path = saved(model, tmp_path, f"model.{extension}")
    assert same_weights(timm.create_model(name, checkpoint_path=path), model)


@pytest.mark.parametrize("name", [NAME, "p4m_resnet20", "cnn7"])
def test_a_folder_that_timm_saved_loads_by_local_dir(tmp_path, name):
    model = timm.create_model(name, num_classes=4, in_chans=2)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_weights(again, model)
    assert (again.num_classes, again.in_chans) == (4, 2)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name


def test_a_folder_that_timm_saved_loads_with_other_classes_and_channels(tmp_path):
    model = timm.create_model("p4m_resnet20", num_classes=4)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, in_chans=1)
    assert again(torch.randn(1, 1, 8, 8)).shape == (1, 2)
    assert torch.equal(again.stages[1][0].conv1.weight, model.stages[1][0].conv1.weight)


HUB_ID = "someone/p4_cnn7.digits"


def hub_cache(folder, model: nn.Module, safe: bool = True) -> None:
    """A Hugging Face cache that holds a repository as timm pushes it."""
    repository = folder / f"models--{HUB_ID.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    save_for_hf(model, repository / "snapshots" / revision, safe_serialization=safe)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


def test_a_hub_name_loads_from_the_cache_without_a_network(tmp_path, offline):
    model = timm.create_model(NAME)
    hub_cache(tmp_path / "cache", model)
    again = timm.create_model(f"hf-hub:{HUB_ID}", pretrained=True, cache_dir=tmp_path / "cache")
    assert same_weights(again, model)


def test_a_hub_name_loads_in_a_process_that_is_offline(tmp_path):
    hub_cache(tmp_path / "hub", timm.create_model(NAME))
    code = f"import timm, gzoo; print(timm.create_model('hf-hub:{HUB_ID}', pretrained=True).group_name)"
    done = fresh.run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", PATH="", HOME=str(tmp_path))
    assert done.stdout.strip() == "p4", done.stderr


def test_a_pickle_on_the_hub_is_not_loaded(tmp_path, offline):
    hub_cache(tmp_path / "cache", timm.create_model(NAME), safe=False)
    with pytest.raises(OSError, match=r"someone/p4_cnn7.digits"):
        timm.create_model(f"hf-hub:{HUB_ID}", pretrained=True, cache_dir=tmp_path / "cache")


# Adapting weights


@pytest.mark.parametrize(("name", "own"), [(NAME, 1), ("p4m_resnet20", 3), ("cnn7", 1), ("p4_convnext_atto", 3)])
@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_pretrained_weights_fit_other_input_channels(tmp_path, name, own, wanted):
    model = timm.create_model(name).eval()
    adapted = from_file(name, saved(model, tmp_path), in_chans=wanted)
    grey = torch.randn(1, 1, 32, 32)
    assert adapted(grey.expand(-1, wanted, -1, -1)).shape == (1, model.num_classes)
    if own == 1 or wanted == 1:  # a grey image in all channels then means the same to both
        expected = model(grey.expand(-1, own, -1, -1))
        torch.testing.assert_close(adapted(grey.expand(-1, wanted, -1, -1)), expected, rtol=1e-4, atol=1e-5)


def test_weights_for_one_channel_load_by_a_config_for_one_channel(tmp_path):
    model = timm.create_model("p4m_resnet20", in_chans=1).eval()
    path = saved(model, tmp_path)
    adapted = from_file("p4m_resnet20", path, in_chans=3, overlay={"input_size": (1, 32, 32)})
    x = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(adapted(x.expand(-1, 3, -1, -1)), model(x), rtol=1e-4, atol=1e-5)


def test_weights_whose_channels_differ_from_the_config_are_refused(tmp_path):
    path = saved(timm.create_model("p4m_resnet20", in_chans=1), tmp_path)
    with pytest.raises(ValueError, match=r"stem.0.weight is \(11, 1, 3, 3\), but the config declares 3 channels"):
        from_file("p4m_resnet20", path, in_chans=4)


@pytest.mark.parametrize("name", [NAME, "p4m_resnet20", "p4_resnet18", "cnn7"])
def test_other_classes_replace_the_classifier_and_nothing_else(tmp_path, name):
    model = timm.create_model(name)
    adapted = from_file(name, saved(model, tmp_path), num_classes=3)
    head = model.pretrained_cfg["classifier"]
    before, after = model.state_dict(), adapted.state_dict()
    assert before.keys() == after.keys()
    for key in after:
        assert key.startswith(head) or torch.equal(after[key], before[key])
    assert after[f"{head}.weight"].shape[0] == 3


@pytest.mark.parametrize("name", [NAME, "p4m_resnet20"])
def test_a_headless_or_feature_model_takes_the_weights_of_a_classifier(tmp_path, name):
    model = timm.create_model(name).eval()
    path, x = saved(model, tmp_path), image(model)
    torch.testing.assert_close(
        from_file(name, path, num_classes=0)(x), model.forward_head(model.forward_features(x), True)
    )
    torch.testing.assert_close(from_file(name, path, features_only=True)(x)[-1], model.forward_features(x))


def test_a_classifier_takes_the_weights_of_a_headless_model(tmp_path):
    model = timm.create_model(NAME, num_classes=0)
    adapted = from_file(NAME, saved(model, tmp_path), num_classes=5, overlay={"num_classes": 0})
    assert torch.equal(adapted.stem[0].weight, model.stem[0].weight)


def test_a_state_dict_in_the_config_is_loaded():
    model = timm.create_model(NAME)
    overlay = {"state_dict": model.state_dict()}
    assert same_weights(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay), model)


# What is refused. Each checkpoint is given as the weights of a model with the same number of classes, where timm loads
# strictly, and with another one, where it does not.

FOREIGN = [
    ("p4m_cnn7", "p4_cnn7", r"of a p4m network in the pixel basis, but the model is a p4 network"),
    ("cnn7", "p4_cnn7", r"of a plain network .* but the model is a p4 network"),
    ("p4_cnn7", "cnn7", r"of a p4 network in the pixel basis, but the model is a plain network"),
    ("p4_resnet20", "p4_cnn7", r"of another architecture or width than the EquivariantStagedCNN"),
    ("p4_resnet32", "p4_resnet20", r"stages.0.3.\S+ is not in the model"),
    ("p4_resnet20", "p4_resnet32", r"stages.0.3.conv1.weight is missing"),
    ("resnet32", "resnet20", r"of another architecture or width than the StagedCNN"),
    ("p4_resnet18", "p4_resnet50", r"of another architecture"),
]


@pytest.mark.parametrize(
    ("given", "model", "message", "num_classes"),
    [*((*case, 7) for case in FOREIGN), (*FOREIGN[0], 10), (*FOREIGN[4], 10)],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, given, model, message, num_classes):
    path = saved(timm.create_model(given, num_classes=10), tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        from_file(model, path, num_classes=num_classes, overlay={"num_classes": 10})
    assert str(raised.value).startswith(path)


@pytest.mark.parametrize(("given", "model", "message"), FOREIGN[:2] + FOREIGN[3:6])
def test_checkpoint_path_refuses_another_model_by_name(tmp_path, given, model, message):
    path = saved(timm.create_model(given, num_classes=10), tmp_path)
    with pytest.raises(ValueError, match=message):
        timm.create_model(model, num_classes=10, checkpoint_path=path)


def test_a_plain_model_refuses_an_equivariant_checkpoint_by_checkpoint_path(tmp_path):
    path = saved(timm.create_model("p4_cnn7"), tmp_path)
    with pytest.raises(RuntimeError, match="group_signature"):  # torch's own error: plain models are plain
        timm.create_model("cnn7", checkpoint_path=path)


def test_a_group_with_the_same_shapes_is_refused():
    plain = timm.create_model("cnn7")
    p4, d2 = gzoo.convert(plain, "p4"), gzoo.convert(plain, "d2")
    shapes = [[tuple(value.shape) for value in model.state_dict().values()] for model in (p4, d2)]
    assert shapes[0] == shapes[1]  # so nothing but the signature tells them apart
    for strict in (True, False):
        with pytest.raises(ValueError, match="of a d2 network in the pixel basis, but the model is a p4 network"):
            p4.load_state_dict(d2.state_dict(), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_a_network_that_pools_otherwise_are_refused(strict):
    plain = timm.create_model("cnn7")
    mean, maximum = (gzoo.convert(plain, "p4", group_pool=pool) for pool in ("mean", "max"))
    with pytest.raises(ValueError, match="of a network with group_pool='max', but the model has 'mean'"):
        mean.load_state_dict(maximum.state_dict(), strict=strict)
    with pytest.raises(ValueError, match="of a network with group_pool='max', but the model has 'mean'"):
        nn.Sequential(mean).load_state_dict(nn.Sequential(maximum).state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "transfer"},
        {"weights": "project"},
        {"match": "flops"},
        {"basis": "steerable"},
        {"head": "pose"},
        {"partial": True},
        {"soft": True},
        {"vectors": {"head.fc": [(0, 1)]}},
        {"vectors": {"head.fc": [gzoo.DoubleAngle(0, 2)]}},
    ],
    ids=str,
)
def test_a_converted_network_is_saved_with_the_options_that_make_it_again(tmp_path, options):
    model = gzoo.convert(timm.create_model("resnet20", num_classes=3, in_chans=1), "p4", **options).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 1, 9, 9)
    assert torch.equal(again(x), model(x))


def test_a_direction_is_learned_from_pretrained_weights_saved_and_loaded(tmp_path):
    vectors = {"head.fc": [gzoo.DoubleAngle(0, 1)]}
    model = timm.create_model("p4m_resnet20", pretrained=True, num_classes=2, vectors=vectors).eval()
    weights = timm.create_model("p4m_resnet20", pretrained=True).state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in weights.items() if not key.startswith("head.fc."))
    assert gzoo.check(model, (9, 12)).worst < 1e-12
    x = torch.randn(1, 3, 9, 12)
    direction = model(x)
    torch.testing.assert_close(model(x.rot90(1, (2, 3))), -direction, rtol=0, atol=1e-5)  # by twice the angle
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), direction)
    again.reset_classifier(3)
    save_for_hf(again, tmp_path, safe_serialization=True)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True)(x).shape == (1, 3)


def test_a_network_that_timm_would_build_by_another_name_is_refused(tmp_path):
    # The zoo's p4_cnn7 pools by the maximum, and timm knows the converted network by its name alone.
    save_for_hf(gzoo.convert(timm.create_model("cnn7"), "p4"), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "p4_cnn7"}))
    with pytest.raises(ValueError, match="of a network with group_pool='mean', but the model has 'max'"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_weights_in_half_precision_and_means_of_two_load():
    models = [gzoo.convert(timm.create_model("cnn7"), "p4") for _ in range(2)]
    one, other = (model.state_dict() for model in models)
    for state in ({k: v.half() for k, v in one.items()}, {k: (v + other[k]) / 2 for k, v in one.items()}):
        assert models[0].load_state_dict(state).missing_keys == []


def test_what_pools_nowhere_loads_whichever_pooling_was_asked_for():
    mean, maximum = (
        gzoo.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "p4", group_pool=p) for p in ("mean", "max")
    )
    maximum.load_state_dict(mean.state_dict())
    x = torch.rand(1, 3, 9, 9)
    assert maximum(x).equal(mean(x))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_of_an_older_gzoo_name_no_pooling_and_fit(assign):
    model = gzoo.convert(timm.create_model("cnn7"), "p4", group_pool="max")
    signature = model.group_signature.tolist()
    state = {**model.state_dict(), "group_signature": torch.tensor([4, 0, 0])}
    for network, values in ((model, state), (nn.Sequential(model), {f"0.{key}": state[key] for key in state})):
        assert network.load_state_dict(values, assign=assign).missing_keys == []
        assert model.group_signature.tolist() == signature  # what it saves next says how it pools


@pytest.mark.parametrize("group", ["p4", "p4m"])
@pytest.mark.parametrize("other", ["steerable", "steerable_3r"])
def test_the_other_kernel_basis_is_refused_by_name(group, other):
    def network(basis):
        model = nn.Sequential(LiftingConv2d(groups.get(group), 1, 2, 3, basis=basis))
        make_equivariant(model, (groups.get(group),), "mean")
        return model

    pixel, steerable = network("pixel"), network(other)
    message = f"of a {group} network in the {other} basis, but the model is a {group} network in the pixel basis"
    with pytest.raises(ValueError, match=message):
        pixel.load_state_dict(steerable.state_dict())
    with pytest.raises(ValueError, match=rf"in the pixel basis, but the model is a .* in the {other} basis"):
        steerable.load_state_dict(pixel.state_dict())
    assert steerable.load_state_dict(network(other).state_dict()).missing_keys == []


def test_a_kernel_basis_of_a_newer_gzoo_is_refused():
    model = timm.create_model(NAME)
    for value in (3, 19):  # without and with a group pooling
        state = {**model.state_dict(), "group_signature": torch.tensor([4, 0, value])}
        with pytest.raises(
            ValueError, match="p4 network in basis 3, of a newer gzoo, but the model is a p4 network in the"
        ):
            model.load_state_dict(state)


def test_another_width_is_refused():
    plain = timm.create_model("cnn7")
    with pytest.raises(ValueError, match=r"stem.0.weight is \(20, 1, 3, 3\), not \(10, 1, 3, 3\); .* and \d+ more"):
        gzoo.convert(plain, "p4").load_state_dict(gzoo.convert(plain, "p4", match="width").state_dict())


def test_a_part_of_a_state_dict_loads_where_the_user_asks_for_it():
    model = timm.create_model(NAME)
    part = {"head.fc.bias": torch.arange(10.0)}
    assert model.load_state_dict(part, strict=False).missing_keys
    assert torch.equal(model.head.fc.bias, torch.arange(10.0))
    with pytest.raises(ValueError, match="names no group"):
        model.load_state_dict(part)


@pytest.mark.parametrize("keep", [0, 6, 200, -100])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = saved(timm.create_model(NAME), tmp_path)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: the file is truncated or corrupt"):
        from_file(NAME, path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_of_garbage_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(ValueError, match=rf"{name}: .*(corrupt|cannot be loaded)"):
        from_file(NAME, str(path))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_that_does_not_exist_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; give the path of a .safetensors or .pth file"):
        from_file(NAME, str(tmp_path / name))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save(timm.create_model(NAME), path)  # the whole model, not its state_dict
    with pytest.raises(ValueError, match=r"model.pth: the weights cannot be loaded: weights_only=True blocked"):
        from_file(NAME, path)


def test_a_local_folder_without_weights_is_named(tmp_path):
    save_for_hf(timm.create_model(NAME), tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No suitable checkpoints found"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_local_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        timm.create_model(f"local-dir:{tmp_path / 'nowhere'}", pretrained=True)


def test_a_model_without_weights_says_so():
    with pytest.raises(ValueError, match=r"p4_resnet110 has no pretrained weights; timm.list_pretrained\(\) lists"):
        timm.create_model("p4_resnet110", pretrained=True)


def test_no_network_and_no_cache_says_what_to_do(cards, register, offline):
    name = register(Entry("d1", "cnn7", weights=("data",)))
    with pytest.raises(ConnectionError, match=r"gzoo/d1_cnn7.data: the Hugging Face Hub cannot be reached"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RepositoryNotFoundError,
            r"gzoo/d1_cnn7.data: there is no such repository or revision on the Hugging",
        ),
        (EntryNotFoundError, r"gzoo/d1_cnn7.data: the repository has no model.safetensors, and gzoo loads no other"),
    ],
)
def test_what_the_hub_does_not_have_is_named(cards, register, monkeypatch, error, message):
    def load(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", load)
    with pytest.raises(FileNotFoundError, match=message):
        timm.create_model(register(Entry("d1", "cnn7", weights=("data",))), pretrained=True)


def test_a_hub_name_without_a_network_says_what_is_missing(offline, tmp_path):
    with pytest.raises(OSError, match="cannot find the requested files in the local cache"):
        timm.create_model(f"hf-hub:{HUB_ID}", pretrained=True, cache_dir=tmp_path)


def test_networks_with_two_first_convolutions_take_their_weights_for_another_task(tmp_path):
    path = str(tmp_path / "repvgg.safetensors")
    model = timm.create_model("p4_repvgg_a0", num_classes=5).eval()
    safetensors.torch.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    other = from_file("p4_repvgg_a0", path, num_classes=3, in_chans=1, overlay={"num_classes": 5})
    assert other.stem.conv_kxk.conv.weight.shape[1] == 1
    assert other.stages[0][0].conv_kxk.conv.weight.equal(model.stages[0][0].conv_kxk.conv.weight)
