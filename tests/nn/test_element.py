"""A plain module on each element of the fibre: commutes with the group, and sees what the plain network sees."""

import pytest
from timm.layers import LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from gzoo.nn import PerElement
from tests.conftest import elements, random_fields, with_random_statistics, worst_error

NORMS = {
    "layer norm": (lambda: LayerNorm2d(4), 1),
    "layer norm, channels last": (lambda: nn.LayerNorm(4), -1),
    "group norm": (lambda: nn.GroupNorm(2, 4), 1),
    "response norm, channels last": (lambda: GlobalResponseNorm(4), -1),
}


@pytest.mark.parametrize("group", ["p4", "p4m"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_on_each_element_commutes_with_the_group(norm, group):
    build, dim = NORMS[norm]
    layer = with_random_statistics(PerElement(build(), len(elements(group)), dim))
    x = random_fields(group, 4).movedim(1, dim).contiguous()
    assert worst_error(layer, group, x, "fields" if dim == 1 else "channels last") < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_each_element_is_what_the_plain_module_gives(norm):
    build, dim = NORMS[norm]
    layer = with_random_statistics(PerElement(build(), 4, dim))
    x = random_fields("p4", 4).movedim(1, dim)
    for g in elements("p4"):
        one = x[:, g::4] if dim == 1 else x[..., g::4]
        result = layer(x)[:, g::4] if dim == 1 else layer(x)[..., g::4]
        assert (result - layer.module(one)).abs().max() < 1e-14
