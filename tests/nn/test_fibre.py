"""Layer norms and layer scales with parameters shared along the fibre commute with the group and keep their class."""

import copy
import io
import pickle

import pytest
import timm.layers as tl
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from gzoo import groups
from gzoo.nn.fibre import share_along_fibre
from tests.conftest import GRID_GROUPS, random_fields, with_random_statistics, worst_error

FIELDS = 3

# Plain module of |G| * FIELDS channels, where its channels stand, its parameters.
MODULES = {
    "LayerNorm": (nn.LayerNorm, "channels last", ("weight", "bias")),
    "timm LayerNorm": (tl.LayerNorm, "channels last", ("weight", "bias")),
    "LayerNorm2d": (tl.LayerNorm2d, "fields", ("weight", "bias")),
    "RmsNorm": (tl.RmsNorm, "channels last", ("weight", "bias")),
    "RmsNorm2d": (tl.RmsNorm2d, "fields", ("weight", "bias")),
    "SimpleNorm2d": (tl.SimpleNorm2d, "fields", ("weight", "bias")),
    "LayerScale": (tl.LayerScale, "channels last", ("gamma",)),
    "LayerScale2d": (tl.LayerScale2d, "fields", ("gamma",)),
}


def shared(name, group):
    """The module with shared parameters, the law of its input, and an input."""
    order = groups.get(group).order
    make, law, names = MODULES[name]
    module = make(FIELDS * order)
    share_along_fibre(module, names, order, FIELDS)
    x = random_fields(group, FIELDS, (4, 6))
    return with_random_statistics(module), law, x.movedim(1, -1).contiguous() if law == "channels last" else x


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_shared_parameters_make_the_module_commute_with_the_group(group, name):
    module, law, x = shared(name, group)
    assert worst_error(module, group, x, law) < 1e-12


@pytest.mark.parametrize("name", MODULES)
def test_the_plain_module_does_not_commute_with_the_group(name):
    make, law, _ = MODULES[name]
    _, _, x = shared(name, "p4m")
    assert worst_error(with_random_statistics(make(FIELDS * 8)), "p4m", x, law) > 0.1


@pytest.mark.parametrize("name", MODULES)
def test_the_state_dict_holds_one_number_per_field(name):
    module, _, _ = shared(name, "p4m")
    assert {tuple(value.shape) for value in module.state_dict().values()} == {(FIELDS,)}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_compute_the_same(name, copied):
    module, _, x = shared(name, "p4")
    assert copied(module)(x).equal(module(x))
    assert isinstance(copied(module), MODULES[name][0])


def test_torch_save_and_load_compute_the_same():
    module, _, x = shared("LayerNorm2d", "p4")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(x).equal(module(x))


def test_a_deepcopy_has_its_own_parameters():
    module, _, _ = shared("LayerScale2d", "p4")
    copied = copy.deepcopy(module)
    copied.load_state_dict({"gamma": torch.zeros(FIELDS)})
    assert module.gamma.all()
    assert not copied.gamma.any()


def test_a_constant_initial_value_is_kept():
    module = tl.LayerScale(FIELDS * 4, init_values=1e-6)
    share_along_fibre(module, ("gamma",), 4, FIELDS)
    assert torch.allclose(module.gamma, torch.tensor(1e-6))


def test_a_parameter_that_is_frozen_stays_frozen():
    module = nn.LayerNorm(FIELDS * 4).requires_grad_(False)
    share_along_fibre(module, ("weight", "bias"), 4, FIELDS)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_norm_without_parameters_passes():
    module = nn.LayerNorm(FIELDS * 4, elementwise_affine=False)
    share_along_fibre(module, ("weight", "bias"), 4, FIELDS)
    assert not module.state_dict()
    assert module(torch.randn(2, FIELDS * 4)).shape == (2, FIELDS * 4)


def test_a_change_of_dtype_and_a_step_reach_what_the_module_reads():
    module = nn.LayerNorm(FIELDS * 4)
    share_along_fibre(module, ("weight", "bias"), 4, FIELDS)
    module.double()
    assert module.weight.dtype == torch.float64
    module(torch.randn(2, FIELDS * 4, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert not module.weight.equal(torch.ones(FIELDS * 4, dtype=torch.float64))


def test_only_named_parameters_of_a_block_are_shared():
    block = ConvNeXtBlock(8, ls_init_value=0.5)
    share_along_fibre(block, ("gamma",), 4, 2)
    assert block._parameters["gamma"].shape == (2,)
    assert block.gamma.shape == (8,)
    assert block.norm.weight.shape == (8,)


def test_copies_of_data_parallel_take_their_parameters():
    module = nn.LayerNorm(8)
    share_along_fibre(module, ("weight", "bias"), 4, 2)
    copied = module._replicate_for_data_parallel()
    for name in ("weight", "bias"):  # as torch.nn.parallel.replicate does
        setattr(copied, name, torch.full((2,), 3.0))
    assert copied.weight.tolist() == 8 * [3.0]
