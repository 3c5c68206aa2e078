"""What `import gzoo` adds to timm: names, configs, and nothing else."""

import json

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

import gzoo
from gzoo import groups, registry
from gzoo.equivariant import classifiers
from gzoo.nn.expand import ExpandedLayer
from gzoo.plan import plan
from gzoo.registry import ENTRIES, GROUPS, Entry
from tests import fresh
from tests.conftest import core_entries, shallow

NAMES = list(registry._BY_NAME)
SMALL = [*(entry.name for entry in core_entries() if entry.group in (None, "p4m")), "c8_cnn7"]


_IMPORT = """
import json, sys, warnings
warnings.simplefilter("error")  # timm warns of a name that is taken
import timm, torch
def settings():
    return [torch.get_num_threads(), str(torch.get_default_dtype()), torch.initial_seed(), torch.is_grad_enabled()]
names, before = set(timm.list_models()), settings()
torch.nn.Module.__init__ = None  # whoever builds a module now fails
import gzoo
now = set(timm.list_models())
print(json.dumps({
    "escnn": "escnn" in sys.modules, "kept": names <= now, "new": len(now - names), "settings": before == settings()
}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """What a fresh process sees of `import gzoo`."""
    done = fresh.run(_IMPORT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # nothing else was printed


def test_importing_gzoo_does_not_import_escnn(fresh_import):
    assert not fresh_import["escnn"]


def test_importing_gzoo_adds_the_entries_and_takes_no_name_of_timm(fresh_import):
    assert fresh_import["kept"]
    assert fresh_import["new"] == len(NAMES)


def test_importing_gzoo_leaves_global_settings_alone(fresh_import):
    assert fresh_import["settings"]


@pytest.mark.parametrize("fill", ["to_empty", "assign"])
@pytest.mark.parametrize("name", ["p4_resnet20", "c8_resnet20", "d8d4d1_resnet20"])
def test_a_network_made_on_the_meta_device_is_filled_from_a_checkpoint(name, fill):
    expected = timm.create_model(name).eval()
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        assert model(torch.randn(1, 3, 32, 32)).is_meta
    if fill == "to_empty":
        model.to("meta").to_empty(device="cpu").load_state_dict(expected.state_dict())
    else:
        model.load_state_dict(expected.state_dict(), assign=True)
    x = torch.randn(1, 3, 32, 32)
    assert model(x).equal(expected(x))


def test_timm_lists_every_entry():
    assert set(NAMES) <= set(timm.list_models())
    assert all(map(timm.is_model, NAMES))


def test_timm_lists_entries_by_their_group():
    listed = timm.list_models("p4m_*")
    assert sorted(listed) == sorted(name for name in NAMES if name.startswith("p4m_"))
    assert "p4m_resnet44" in listed


def test_timm_lists_the_zoo_as_one_module():
    assert set(timm.list_models(module="registry")) == set(NAMES)


def test_timm_lists_as_pretrained_exactly_the_entries_with_tags():
    listed = {name for name in timm.list_models(pretrained=True) if name.split(".")[0] in NAMES}
    assert listed == {f"{entry.name}.{tag}" for entry in ENTRIES for tag in entry.weights}


def test_names_are_unique():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "fields"), [("d4_resnet18", 28), ("c8_resnet18", 28), ("d8_resnet18", 20)])
def test_the_tag_of_equivision_gives_its_widths_max_pooling_and_strides(name, fields):
    model = timm.create_model(f"{name}.equivision_in1k", num_classes=5, strides="original")
    assert model.num_features == 8 * fields * model.group.order
    assert model.fc.group_pool.pool == "max"
    assert isinstance(timm.create_model(name.replace("d4", "p4m"), num_classes=5), type(model))


def test_weights_that_only_a_file_has_are_not_listed():
    assert not [name for name in timm.list_models(pretrained=True) if "equivision" in name or "redet" in name]


@pytest.mark.parametrize("backbone", registry._BACKBONES)
def test_the_config_names_the_first_convolution_and_the_classifier(backbone):
    config = get_pretrained_cfg(f"p4m_{backbone}")
    with torch.device("meta"):
        plain = registry._BACKBONES[backbone].plain()
    first = (config.first_conv,) if isinstance(config.first_conv, str) else config.first_conv
    assert all(isinstance(plain.get_submodule(path), torch.nn.Conv2d) for path in first)
    classifier = (config.classifier,) if isinstance(config.classifier, str) else config.classifier
    inside = {module for head in classifiers(plain) for module in head.modules()}
    assert {plain.get_submodule(path) for path in classifier} <= inside
    assert plain.num_classes == config.num_classes


def test_every_backbone_has_an_entry_for_every_group():
    assert len(registry._BACKBONES) >= 40
    for group in GROUPS:
        assert {entry.backbone for entry in ENTRIES if entry.group == group} == set(registry._BACKBONES)


def test_an_entry_knows_its_plain_twin():
    assert all(timm.is_model(entry.backbone) for entry in ENTRIES)


@pytest.mark.parametrize("name", SMALL)
def test_an_entry_runs_and_reloads(name):
    model = timm.create_model(name, num_classes=3, **shallow(name)).eval()
    assert getattr(model, "group_name", None) == {entry.name: entry.group for entry in ENTRIES}[name]
    x = torch.randn(1, *model.pretrained_cfg["input_size"])[..., :32, :32]
    with torch.no_grad():
        y = model(x)
        assert y.shape[:2] == (1, 3)
        again = timm.create_model(name, num_classes=3, **shallow(name)).eval()
        assert not torch.equal(again(x), y)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), y)


def test_an_entry_spells_its_group_by_the_canonical_name():
    with pytest.raises(ValueError, match="d4 is spelled p4m in names"):
        Entry("d4", "resnet20")


def test_an_entry_with_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="unknown backbone 'resnet19'; known are resnet20"):
        Entry("p4", "resnet19")


def test_an_entry_with_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="unknown group 'p5'; accepted are p4"):
        Entry("p5", "resnet20")


@pytest.mark.parametrize(
    ("name", "subgroup", "expected"),
    [("p4m_resnet20", "c1", "c1"), ("p4m_resnet20", "c4", "p4"), ("c8_cnn6", "p4", "p4")],
)
def test_an_entry_has_the_same_kernels_over_a_subgroup(name, subgroup, expected):
    model, smaller = timm.create_model(name), timm.create_model(name, subgroup=subgroup)
    assert smaller.group_name == expected
    gzoo.grow(model, smaller)  # raises unless all fits


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_an_entry_matches_parameters_channels_or_multiply_adds_in_either_basis():
    plain = timm.create_model("wrn16_8")
    ratios = [
        count(timm.create_model("d8d4d1_wrn16_8", match=match)) / count(plain) for match in ("params", "width", "flops")
    ]
    assert abs(ratios[0] - 1) < 0.1
    assert ratios[1] > 2
    assert ratios[2] < 0.7
    steerable = timm.create_model("p4_resnet20", basis="steerable")
    assert abs(count(steerable) / count(timm.create_model("p4_resnet20")) - 1) < 0.1
    assert gzoo.check(steerable, 17).worst < 1e-12
    with pytest.raises(ValueError, match=r"resnet20 is a plain network; match=.width. is for .* p4_resnet20"):
        timm.create_model("resnet20", match="width")


@pytest.mark.parametrize(("name", "match"), [("d8_cnn7", "params"), ("d16_cnn7", "params"), ("p4m_cnn7", "flops")])
def test_where_one_scale_misses_its_match_an_entry_has_single_fields_more_or_less(name, match):
    """For any number of classes, or weights would not fit a new classifier."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    planned = plan(timm.create_model("cnn7"), groups.chain(entry.group), match, basis=entry.basis)
    assert planned.steps
    models = [timm.create_model(name, match=match, num_classes=classes, in_chans=classes) for classes in (10, 3)]
    assert count(models[0]) > count(models[1])
    for model in models:
        widths = [layer.out_fields for layer in model.modules() if isinstance(layer, ExpandedLayer)]
        assert widths == [row.fields for row in planned.layers() if row.macs][: len(widths)]


def test_the_widths_of_a_paper_are_not_those_of_another_match():
    plain = count(timm.create_model("allcnnc"))
    counts = {match: count(timm.create_model("p4m_allcnnc", match=match)) for match in ("params", "flops", "width")}
    assert timm.create_model("p4m_allcnnc").num_features == 64 * 8  # the paper's
    assert timm.create_model("p4m_allcnnc", match="width").num_features == 192 * 8
    assert counts["flops"] < plain / 4 < plain * 4 < counts["width"]


@pytest.mark.parametrize(
    ("name", "subgroup", "message"),
    [
        ("p4_resnet20", "d1", "d1 is no subgroup of p4; its subgroups are c1, c2, p4"),
        ("resnet20", "c1", "resnet20 is a plain network; subgroup='c1' is for those over a group, p4_resnet20"),
        ("d8d4d1_resnet20", "d4", "d8d4d1_resnet20 is not over one group"),
        ("p4_resnet20", "q1", "unknown group 'q1'"),
    ],
)
def test_an_entry_has_no_other_subgroup(name, subgroup, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, subgroup=subgroup)


@pytest.mark.parametrize("name", ["se2_resnet", "e2_resnet", "c8_resnet50.redet", "d1_resnet18.equivision_in1k"])
@pytest.mark.parametrize(("option", "value"), [("head", "pose"), ("soft", True), ("match", "width")])
def test_models_that_gzoo_did_not_convert_refuse_the_options_of_converted_ones(name, option, value):
    with pytest.raises(ValueError, match=f"{name} takes {option}=.* alone, not {value!r}.*Leave {option} out"):
        timm.create_model(name, **{option: value})


def test_such_a_model_takes_those_options_where_they_ask_for_nothing():
    assert timm.create_model("se2_resnet", head="invariant", soft=False).num_classes == 10


def test_a_factory_documents_its_model():
    assert "resnet44 over p4m. arXiv:1602.07576" in registry.p4m_resnet44.__doc__


def test_an_unknown_tag_is_refused():
    with pytest.raises(ValueError, match="p4_resnet110 has no weights with the tag 'nope'; it has none"):
        timm.create_model("p4_resnet110.nope")


@pytest.mark.parametrize("name", ["p4_cnn7", "p4m_resnet20", "p4_resnet18"])
def test_a_model_without_a_class_count_has_that_of_its_data(name):
    assert timm.create_model(name).num_classes == get_pretrained_cfg(name).num_classes


def test_the_group_of_a_model_is_the_one_in_its_name():
    assert timm.create_model("p4m_cnn7").group == groups.get("d4")
