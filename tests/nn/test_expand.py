"""The filter of an eval layer is cached, and never stale; the state_dict never shows it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gzoo import groups
from gzoo.bases import expand
from gzoo.nn import GroupConv2d, GroupLinear, LiftingConv2d

P4 = groups.get("p4")


@pytest.fixture
def layer():
    """A layer in eval mode whose filter is cached."""
    layer = GroupConv2d(P4, 2, 2, 3, padding=1).eval()
    with torch.no_grad():
        layer.filter()
    return layer


def fresh(layer):
    return expand(layer.weight.detach(), layer.basis)


def is_current(layer):
    with torch.no_grad():
        return layer.filter().equal(fresh(layer))


def test_without_gradients_an_eval_layer_expands_once(layer):
    with torch.no_grad():
        assert layer.filter() is layer.filter()


def test_a_training_layer_expands_every_time(layer):
    layer.train()
    with torch.no_grad():
        assert layer.filter() is not layer.filter()


@pytest.mark.parametrize("fused", [False, True])  # a fused one does not count its changes
def test_an_optimizer_step_renews_the_filter(layer, fused):
    before = fresh(layer)
    layer(torch.randn(1, 8, 5, 5)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused).step()
    assert is_current(layer)
    assert not fresh(layer).equal(before)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_renews_the_filter(layer, assign):
    layer.load_state_dict(GroupConv2d(P4, 2, 2, 3).state_dict(), assign=assign)
    assert is_current(layer)


def test_an_edit_in_place_renews_the_filter(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
    assert is_current(layer)


def test_another_parameter_in_its_place_renews_the_filter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert is_current(layer)


def test_other_memory_under_the_parameter_renews_the_filter(layer):
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    nn.utils.vector_to_parameters(2 * vector, layer.parameters())
    assert is_current(layer)
    for _ in range(20):  # the memory before the last may come back
        for _ in range(2):
            nn.utils.vector_to_parameters(torch.randn_like(vector), layer.parameters())
        assert is_current(layer)
        layer.weight.data = torch.empty(0)
        layer.weight.data = torch.randn(2, 2, 4, 3, 3)
        assert is_current(layer)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn_like(layer.weight)))
    assert is_current(layer)


def test_weights_that_torch_func_wraps_expand(layer):
    stacked = torch.stack([layer.weight.detach(), 2 * layer.weight.detach()])
    x = torch.randn(1, 8, 5, 5)

    def run(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(stacked), torch.stack([run(weight) for weight in stacked]))
    assert is_current(layer)


def test_an_edit_through_data_is_seen_after_eval(layer):
    layer.weight.data.mul_(2)
    assert is_current(layer.eval())


def test_a_deepcopy_has_its_own_filter(layer):
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.zero_()
    assert is_current(copied)
    assert is_current(layer)
    assert not fresh(copied).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_change_of_dtype_renews_the_filter(layer, dtype):
    layer.to(dtype)
    with torch.no_grad():
        assert layer.filter().dtype == dtype
    assert is_current(layer)


def test_half_and_back_renews_the_filter(layer):
    layer.half().float()
    assert is_current(layer)


def test_train_and_eval_renew_the_filter(layer):
    layer.train()
    layer.weight.data.mul_(2)
    assert is_current(layer.eval())


def test_a_model_that_holds_the_layer_renews_its_filter(layer):
    model = nn.Sequential(nn.Sequential(layer))
    model.load_state_dict({"0.0.weight": torch.ones(2, 2, 4, 3, 3), "0.0.bias": torch.zeros(2)})
    assert is_current(layer)
    assert is_current(model.double()[0][0])


@pytest.mark.parametrize(
    "layer",
    [GroupConv2d(P4, 2, 2, 3), LiftingConv2d(P4, 2, 2, 3), GroupLinear(P4, 2, 2)],
    ids=lambda x: type(x).__name__,
)
def test_the_state_dict_is_the_weight_and_the_bias_in_train_and_eval(layer):
    for mode in (True, False):
        layer.train(mode)
        with torch.no_grad():
            layer.filter()
        state = layer.state_dict()
        assert list(state) == ["bias", "weight"] or list(state) == ["weight", "bias"]
        assert state["weight"].shape[:2] == (2, 2)


def test_a_pickle_holds_no_filter(layer):
    layer = GroupConv2d(P4, 16, 16, 3).eval()
    before = len(pickle.dumps(layer))
    with torch.no_grad():
        layer.filter()
    assert len(pickle.dumps(layer)) == before
    restored = torch.load(_saved(layer), weights_only=False)
    assert is_current(restored)
    assert restored.weight.equal(layer.weight)


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_gradients_flow_to_the_weight_in_eval_mode(layer):
    layer(torch.randn(1, 8, 5, 5)).sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_a_frozen_layer_in_eval_mode_passes_gradients_to_its_input(layer):
    layer.requires_grad_(False)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_inference_mode_gives_the_same_result(layer):
    x = torch.randn(1, 8, 5, 5)
    expected = layer(x)
    with torch.inference_mode():
        assert layer(x).equal(expected)


def test_a_layer_that_ran_in_inference_mode_passes_gradients_afterwards(layer):
    layer = copy.deepcopy(layer).requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(1, 8, 5, 5))
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("basis", ["pixel", "steerable"])
def test_a_layer_that_ran_under_autocast_has_a_filter_of_full_precision_afterwards(basis):
    layer, x = LiftingConv2d(P4, 1, 2, 3, basis=basis).eval(), torch.randn(1, 1, 5, 5)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert layer(x).equal(copy.deepcopy(layer)(x))


def test_a_layer_runs_on_the_meta_device():
    layer = LiftingConv2d(P4, 1, 2, 3, basis="steerable").eval().to("meta")
    with torch.no_grad():
        assert layer(torch.empty(1, 1, 5, 5, device="meta")).shape == (1, 8, 3, 3)


def test_a_layer_made_in_inference_mode_runs_and_sees_its_edits():
    with torch.inference_mode():
        layer = GroupConv2d(P4, 2, 2, 3).eval()
        layer.filter()
        layer.weight.mul_(2)
        assert layer.filter().equal(fresh(layer))


def test_an_ensemble_through_vmap_equals_its_members():
    members = [GroupConv2d(P4, 2, 2, 3).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(1, 8, 5, 5)

    def run(parameters, buffers):
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    with torch.no_grad():
        together = torch.vmap(run)(parameters, buffers)
        for result, member in zip(together, members, strict=True):
            assert torch.allclose(result, member(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # torch's own, at the first forward derivative
def test_forward_derivatives_see_the_weight(layer):
    layer, x = layer.double(), torch.randn(1, 8, 5, 5, dtype=torch.float64)
    weight, tangent = layer.weight.detach(), torch.randn_like(layer.weight)

    def run(weight):
        return torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias.detach()}, (x,))

    with torch.no_grad():
        _, derivative = torch.func.jvp(run, (weight,), (tangent,))
        assert torch.allclose(derivative, run(weight + tangent) - run(weight))
