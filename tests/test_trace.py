"""Following channels through a plain network: what is tied, strung, cut, and what cannot be followed."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from gzoo.segments import Segment, cut, flat, tie
from gzoo.trace import trace


class Network(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def seen(forward, **layers):
    return trace(Network(forward, **layers), torch.randn(2, 3, 8, 8))


def conv(width_in, width_out, **options):
    return nn.Conv2d(width_in, width_out, 1, **options)


def sizes(segments):
    return [segment.size for segment in flat(segments)]


def same(first, second):
    return [id(segment) for segment in flat(first)] == [id(segment) for segment in flat(second)]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(lengths, st.lists(st.integers(1, 40), max_size=4))
@settings(max_examples=200, deadline=None)
def test_tied_strings_become_one_and_keep_their_length(parts, cuts):
    total = sum(parts)
    first = tuple(Segment(size) for size in parts)
    second = (Segment(total),)
    for position in cuts:
        cut(second, position % (total + 1))
    tie(first, second)
    assert same(first, second)
    assert sum(sizes(first)) == total
    before, after = cut(first, total // 2)
    assert (sum(sizes(before)), sum(sizes(after))) == (total // 2, total - total // 2)
    assert same(first, second)


def test_a_string_tied_to_a_shift_of_itself_becomes_periodic():
    a, b = Segment(4), Segment(2)
    tie((a, b), (b, a))
    assert len({id(segment) for segment in flat((a, b))}) == 1


def test_a_cut_in_a_segment_that_stands_there_twice_cuts_it_twice():
    a = Segment(6)
    left, right = cut((a, a, a), 8)
    assert (sizes(left), sizes(right)) == ([2, 4, 2], [4, 2, 4])
    assert same(left[:1], left[2:])


def test_what_is_added_is_tied():
    found = seen(lambda self, x: self.a(x) + self.b(x), a=conv(3, 8), b=conv(3, 8))
    assert same(found.outputs["a"], found.outputs["b"])


def test_a_gate_of_one_pixel_is_tied_to_what_it_scales():
    found = seen(lambda self, x: self.a(x) * self.b(x).mean((2, 3), keepdim=True), a=conv(3, 8), b=conv(3, 8))
    assert same(found.outputs["a"], found.outputs["b"])


def test_what_is_not_added_stays_free():
    found = seen(lambda self, x: self.b(self.a(x)), a=conv(3, 8), b=conv(8, 8))
    assert not same(found.outputs["a"], found.outputs["b"])
    assert same(found.outputs["a"], found.inputs["b"])


def test_a_concatenation_strings_its_parts():
    found = seen(
        lambda self, x: self.c(torch.cat([self.a(x), self.b(x)], 1)), a=conv(3, 8), b=conv(3, 5), c=conv(13, 2)
    )
    assert same(found.inputs["c"], (*found.outputs["a"], *found.outputs["b"]))


SPLITS = {
    "split": lambda y: y.split([5, 8], 1),
    "torch.split": lambda y: torch.split(y, [5, 8], dim=1),
    "tensor_split": lambda y: y.tensor_split([5], 1),
    "slices": lambda y: (y[:, :5], y[:, 5:]),
    "ellipsis": lambda y: (y[..., :5, :, :], y[..., -8:, :, :]),
    "narrow": lambda y: (y.narrow(1, 0, 5), y.narrow(1, 5, 8)),
    "channels last": lambda y: [part.permute(0, 3, 1, 2) for part in y.permute(0, 2, 3, 1).split([5, 8], -1)],
    "transposed": lambda y: [part.transpose(1, 3) for part in y.transpose(1, 3).split([5, 8], 3)],
}


@pytest.mark.parametrize("how", SPLITS)
def test_a_split_cuts(how):
    def forward(self, x):
        left, right = SPLITS[how](self.a(x))
        return self.left(left), self.right(right)

    found = seen(forward, a=conv(3, 13), left=conv(5, 2), right=conv(8, 2))
    assert sizes(found.outputs["a"]) == [5, 8]
    assert same((*found.inputs["left"], *found.inputs["right"]), found.outputs["a"])


def test_a_split_says_which_numbers_it_used():
    found = seen(lambda self, x: self.a(x)[:, 3:7], a=conv(3, 13))
    assert [size for size, _ in found.pieces[""]] == [4]
    assert [size for size, _ in found.prefixes[""]] == [3, 13]


def test_halves_are_tied_when_one_gates_the_other():
    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        return left * right.sigmoid()

    assert len({id(segment) for segment in flat(seen(forward, a=conv(3, 8)).outputs["a"])}) == 1


def test_depthwise_gives_what_it_is_given():
    found = seen(lambda self, x: self.b(self.a(x)), a=conv(3, 8), b=conv(8, 16, groups=8))
    assert same(found.outputs["b"], 2 * found.outputs["a"])


def test_grouped_convolutions_leave_their_groups_with_both_widths():
    found = seen(lambda self, x: self.b(self.a(x)), a=conv(3, 8), b=conv(8, 12, groups=4))
    assert [segment.groups for segment in flat((*found.outputs["a"], *found.outputs["b"]))] == [{4}, {4}]


def test_a_layer_that_runs_twice_has_one_width():
    found = seen(lambda self, x: self.b(self.b(self.a(x))), a=conv(3, 8), b=conv(8, 8))
    assert same(found.outputs["a"], found.outputs["b"])


VIEWS = {
    "stack of paths": (lambda y, z: torch.stack([y, z], 1).sum(1), "ab"),
    "paths out of channels": (lambda y, z: y.view(2, 2, 4, 8, 8).sum(1), "halves"),
    "paths into channels": (lambda y, z: torch.stack([y, z], 1).flatten(1, 2), "ab"),
    "pooled and flattened": (lambda y, z: F.adaptive_avg_pool2d(y, 1).flatten(1)[:, :, None, None] + z, "ab"),
    "pixels as a sequence": (lambda y, z: y.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (8, 8)) + z, "ab"),
    "resized": (lambda y, z: F.interpolate(y, (4, 4)) + F.max_pool2d(z, 2), "ab"),
    "padded": (lambda y, z: F.pad(y, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] + z, "ab"),
    "written in place": (lambda y, z: y.add_(z).relu_(), "ab"),
}


@pytest.mark.parametrize("how", VIEWS)
def test_views_are_followed(how):
    view, tied = VIEWS[how]
    found = seen(lambda self, x: self.c(view(self.a(x), self.b(x))), a=conv(3, 8), b=conv(3, 8), c=nn.LazyConv2d(2, 1))
    assert "c" in found.inputs
    if tied == "ab":
        assert same(found.outputs["a"], found.outputs["b"])
    else:
        assert len({id(segment) for segment in flat(found.outputs["a"])}) == 1


LOST = {
    "flattened pixels": (lambda y: y.flatten(1)[:, :, None, None], "flatten"),
    "mean of channels at another place": (lambda y: y.mean(1).unsqueeze(2), "mean"),
    "every second channel": (lambda y: y[:, ::2], "__getitem__"),
    "product over pixels": (lambda y: torch.einsum("bchw,bdhw->bcd", y, y).unsqueeze(3), "einsum"),
}


@pytest.mark.parametrize("how", LOST)
def test_what_mixes_channels_is_lost_by_name(how):
    step, name = LOST[how]
    found = seen(lambda self, x: self.c(step(self.a(x))), a=conv(3, 9), c=nn.LazyConv2d(2, 1))
    assert found.lost == {"c": name}


def without_fibre(segments):
    return [(segment.size, segment.image) for segment in flat(segments)]


def test_a_mean_over_channels_has_no_fibre():
    found = seen(
        lambda self, x: self.c(torch.cat([self.a(x).mean(1, keepdim=True), self.a(x).amax(1, keepdim=True)], 1)),
        a=conv(3, 9),
        c=conv(2, 4),
    )
    assert without_fibre(found.inputs["c"]) == [(1, True), (1, True)]
    assert without_fibre(found.outputs["c"]) == [(4, False)]


def test_one_channel_that_is_multiplied_with_all_has_no_fibre():
    found = seen(
        lambda self, x: self.b(self.a(x) * self.gate(x).sigmoid()), a=conv(3, 9), gate=conv(3, 1), b=conv(9, 2)
    )
    assert without_fibre(found.outputs["gate"]) == [(1, True)]
    assert without_fibre(found.outputs["a"]) == [(9, False)]


def test_one_channel_among_others_that_is_multiplied_with_all_has_no_fibre():
    found = seen(lambda self, x: (lambda y: self.b(y[:, :8] * y[:, 8:]))(self.a(x)), a=conv(3, 9), b=conv(8, 2))
    assert without_fibre(found.outputs["a"]) == [(8, False), (1, True)]


def test_one_channel_that_meets_one_channel_keeps_its_fibre():
    found = seen(lambda self, x: self.b(self.a(x) * self.gate(x)), a=conv(3, 1), gate=conv(3, 1), b=conv(1, 2))
    assert without_fibre(found.outputs["gate"]) == [(1, False)]


def test_the_network_stays_as_it_is():
    network = Network(lambda self, x: self.a(x), a=conv(3, 8)).train()
    before = network.a.weight.clone()
    trace(network, torch.randn(2, 3, 8, 8))
    assert network.a.weight.equal(before)
    assert network.training
    assert not network.a._forward_hooks


def test_a_network_that_reads_numbers_is_run_for_real():
    found = seen(lambda self, x: self.a(x) if x.sum().item() > -1e9 else x, a=conv(3, 8))
    assert sizes(found.outputs["a"]) == [8]
