"""The pixel basis, against the definition of Cohen & Welling 2016 as loops; the steerable one, against escnn's; both
between quotient fields."""

import itertools
from functools import partial

import pytest
import torch

from gzoo import _escnn, bases, groups
from tests.conftest import GRID_GROUPS, elements


def turned_pixel(group, g, i, j, size):
    """Where g moves pixel (row i, column j) of a square to; rows point down, so a counterclockwise turn takes the right
    end of the first row to its left end."""
    if g >= group.rotations:
        j = size - 1 - j
    for _ in range(g % group.rotations * 4 // group.rotations):
        i, j = size - 1 - j, i
    return i, j


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_lifting_filters_are_equation_10(group, size):
    G, w = groups.get(group), torch.randn(2, 3, size, size)
    filters = bases.expand(w, bases.lifting_basis(G, size)).view(2, G.order, 3, size, size)
    for g, i, j in itertools.product(elements(group), range(size), range(size)):
        # filter[g](y) = w(g^-1 y), so filter[g](g y) = w(y).
        u, v = turned_pixel(G, g, i, j, size)
        assert filters[:, g, :, u, v].equal(w[:, :, i, j])


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_regular_filters_are_equation_11(group, size):
    G = groups.get(group)
    w = torch.randn(2, 3, G.order, size, size)
    filters = bases.expand(w, bases.regular_basis(G, size)).view(2, G.order, 3, G.order, size, size)
    for g, h, i, j in itertools.product(elements(group), elements(group), range(size), range(size)):
        # filter[g, h](y) = w(g^-1 h, g^-1 y), so filter[g, gh](g y) = w(h, y).
        u, v = turned_pixel(G, g, i, j, size)
        assert filters[:, g, :, G.multiply(g, h), u, v].equal(w[:, :, h, i, j])


@pytest.mark.parametrize("group", ["c3", "c8", "d5", "d8"])
def test_a_kernel_without_pixels_is_equation_11_for_every_group(group):
    G = groups.get(group)
    w = torch.randn(2, 3, G.order, 1, 1)
    filters = bases.expand(w, bases.regular_basis(G, 1)).view(2, G.order, 3, G.order)
    for g, h in itertools.product(elements(group), elements(group)):
        assert filters[:, g, :, G.multiply(g, h)].equal(w[:, :, h, 0, 0])


BUILDERS = {
    "lifting": lambda group: bases.lifting_basis.__wrapped__(group, 3),
    "regular": lambda group: bases.regular_basis.__wrapped__(group, 3),
    "quotient": lambda group: bases.quotient_basis.__wrapped__(group, 3, groups.get("c2"), groups.get("c1")),
}


@pytest.mark.parametrize("context", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference"])
@pytest.mark.parametrize("group", ["p4", "c8"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_basis_does_not_depend_on_the_context_of_its_first_use(kind, group, context):
    bases._polar.cache_clear()
    with context:
        first = BUILDERS[kind](groups.get(group))  # past the cache: as on the first use
    bases._polar.cache_clear()
    for made, expected in zip(first[1:3], BUILDERS[kind](groups.get(group))[1:3], strict=True):
        assert made is expected is None or (made.equal(expected) and not made.is_inference())


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_a_3x3_pair_of_regular_fields_has_9_times_the_order_free_parameters(group):
    G = groups.get(group)
    parameters = torch.eye(9 * G.order).view(-1, 1, G.order, 3, 3)
    filters = bases.expand(parameters, bases.regular_basis(G, 3)).view(9 * G.order, -1)
    assert torch.linalg.matrix_rank(filters) == 9 * G.order


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_pixel_basis_is_all_of_the_equivariant_filters(group, size):
    # Filters K with K[gh, gh'](g y) = K[h, h'](y): the fixed space of the action, whose dimension is the mean trace.
    G = groups.get(group)
    index = torch.arange(G.order**2 * size**2).view(G.order, G.order, size, size)
    traces = []
    for g in elements(group):
        rows = torch.tensor([G.multiply(G.inverse(g), h) for h in elements(group)])
        moved = G.transform_image(index[rows][:, rows], g)
        traces.append((moved == index).sum().item())
    assert sum(traces) / G.order == G.order * size**2


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_filter_of_the_basis_is_equivariant(group, size):
    G = groups.get(group)
    filters = bases.expand(torch.randn(1, 1, G.order, size, size), bases.regular_basis(G, size))
    for g in elements(group):
        rows = torch.tensor([G.multiply(G.inverse(g), h) for h in elements(group)])
        assert G.transform_image(filters[rows][:, rows], g).equal(filters)


def test_a_filter_with_one_tap_changed_is_not_equivariant():
    G = groups.get("p4")
    filters = bases.expand(torch.randn(1, 1, 4, 3, 3), bases.regular_basis(G, 3))
    filters[0, 0, 0, 0] += 1
    rows = torch.tensor([G.multiply(G.inverse(1), h) for h in elements("p4")])
    assert not G.transform_image(filters[rows][:, rows], 1).equal(filters)


def test_an_index_is_computed_once_for_a_group_and_a_size():
    assert bases.regular_basis(groups.get("d4"), 3) is bases.regular_basis(groups.get("p4m"), 3)


# --- the steerable basis ---


STEERABLE = {"lifting": bases.lifting_basis, "regular": bases.regular_basis}

# Every group up to d16. escnn takes seconds to build a basis of a large dN, and 36 s for d16.
_QUICK = (*(f"c{n}" for n in range(1, 17)), "d1", "d2", "d3", "d4")
ALL_GROUPS = [
    pytest.param(f"{kind}{n}", marks=[] if f"{kind}{n}" in _QUICK else pytest.mark.slow)
    for n in range(1, 17)
    for kind in "cd"
]


def steerable_filters(kind, group, size, name="steerable"):
    """The filters of one pair of fields, one for each parameter: (parameters, all numbers of a filter)."""
    basis = STEERABLE[kind](groups.get(group), size, name)
    count = torch.Size(basis.parameters).numel()
    return bases.expand(torch.eye(count).view(-1, 1, *basis.parameters), basis).view(count, -1).double()


def escnn_filters(kind, group, size, **options):
    """The same of escnn's default basis, or of another."""
    G = groups.get(group)
    return escnns_filters(G.image_type(1) if kind == "lifting" else G.field_type(1), G.field_type(1), size, **options)


def escnns_filters(in_type, out_type, size, **options):
    # recompute=True: escnn keeps one sampled basis per process, whose dtype another layer may have changed.
    layer = _escnn.load().nn.R2Conv(in_type, out_type, size, bias=False, recompute=True, **options)
    with torch.no_grad():
        filters = [layer.basisexpansion(one).double().flatten() for one in torch.eye(layer.weights.numel())]
    return torch.nn.functional.normalize(torch.stack(filters), dim=1)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("kind", STEERABLE)
@pytest.mark.parametrize("group", ALL_GROUPS)
def test_steerable_filters_span_those_of_escnn(group, kind, size):
    ours, theirs = steerable_filters(kind, group, size), escnn_filters(kind, group, size)
    ranks = [
        torch.linalg.matrix_rank(filters, rtol=1e-5).item() for filters in (ours, theirs, torch.cat([ours, theirs]))
    ]
    assert ranks == [len(ours)] * 3
    assert len(theirs) == len(ours)


@pytest.mark.parametrize(
    ("kind", "group", "size"),
    [
        *((kind, group, 3) for kind in STEERABLE for group in ("c1", "c3", "p4m", "c8", "c16")),
        *(("regular", "c8", 5), ("lifting", "c8", 5), ("lifting", "c8", 7), ("lifting", "c5", 9), ("lifting", "d8", 3)),
    ],
)
def test_steerable_3r_filters_span_those_of_escnn_with_that_cutoff(kind, group, size):
    ours = steerable_filters(kind, group, size, "steerable_3r")
    theirs = escnn_filters(kind, group, size, frequencies_cutoff=lambda r: 3 * r)
    ranks = [
        torch.linalg.matrix_rank(filters, rtol=1e-5).item() for filters in (ours, theirs, torch.cat([ours, theirs]))
    ]
    assert ranks == [len(ours)] * 3
    assert len(theirs) == len(ours)


@pytest.mark.parametrize(("size", "functions"), [(2, 1), (3, 8), (4, 8), (5, 21), (7, 40), (9, 65)])
def test_steerable_3r_functions_are_independent_on_the_pixels_and_more_than_escnns_default(size, functions):
    basis, default = (bases.lifting_basis(groups.get("c16"), size, name) for name in ("steerable_3r", "steerable"))
    assert basis.parameters == (1, functions)
    for pose, fewer in zip(basis.samples, default.samples, strict=True):
        assert (
            torch.linalg.matrix_rank(pose, rtol=1e-2) == torch.linalg.matrix_rank(torch.cat([pose, fewer])) == functions
        )
    assert functions > default.parameters[1] or size == 2


@pytest.mark.parametrize("kind", STEERABLE)
def test_the_filters_of_another_group_of_the_same_order_span_something_else(kind):
    both = torch.cat([steerable_filters(kind, group, 3) for group in ("d4", "c8")])
    assert torch.linalg.matrix_rank(both, rtol=1e-5) > len(both) // 2


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_on_the_grid_every_steerable_filter_is_a_pixel_filter(group):
    G = groups.get(group)
    pixel = bases.regular_basis(G, 3, "pixel")
    assert pixel is not bases.regular_basis(G, 3, "steerable")
    steerable = steerable_filters("regular", group, 3).view(-1, G.order, G.order, 3, 3)
    # filter[e, h](y) = w(h, y): the first row of a filter is its parameters.
    again = bases.expand(steerable[:, 0].unsqueeze(1), pixel)
    assert again.view_as(steerable).equal(steerable)


def test_a_pixel_basis_off_the_grid_is_refused_unless_the_kernel_is_one_pixel():
    G = groups.get("c8")
    for basis in STEERABLE.values():
        with pytest.raises(ValueError, match=r"c8 turns kernels of 3x3 pixels between the pixels.*basis='steerable'"):
            basis(G, 3, "pixel")
        assert basis(G, 1, "pixel").source.equal(basis(G, 1, "steerable").source)


def test_an_unknown_basis_is_refused():
    with pytest.raises(
        ValueError, match="basis is 'pixels'; accepted are 'pixel', 'steerable', 'steerable_3r' and None"
    ):
        bases.lifting_basis(groups.get("p4"), 1, "pixels")


def test_a_basis_is_built_once_for_a_group_and_a_size():
    G = groups.get("d16")
    assert bases.regular_basis(G, 3) is bases.regular_basis(groups.Group(16, True), 3)
    assert bases.lifting_basis(G, 3) is bases.lifting_basis(groups.Group(16, True), 3)


@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d8", "c12", "d6", "c3", "d5"])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_steerable_filters_are_exact_on_the_turns_that_fit_the_grid(group, size):
    G = groups.get(group)
    basis = bases.regular_basis(G, size, "steerable")
    w = torch.randn(2, 3, *basis.parameters, dtype=torch.float64)
    x = torch.randn(1, 3 * G.order, 6, 9, dtype=torch.float64)
    convolve = partial(torch.nn.functional.conv2d, weight=bases.expand(w, basis))
    for g in G.grid_elements:
        expected = G.transform_features(convolve(x), g)
        assert (convolve(G.transform_features(x, g)) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_steerable_filters_of_neighbouring_elements_differ():
    basis = bases.lifting_basis(groups.get("c8"), 5)
    filters = bases.expand(torch.randn(1, 1, *basis.parameters), basis)
    assert (filters[1] - filters[0]).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch, where it checks forward derivatives
@pytest.mark.parametrize("basis", [bases.lifting_basis, bases.regular_basis])
@pytest.mark.parametrize("group", ["c2", "p4m", "c8"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_of_the_expansion_is_that_of_finite_differences(group, size, basis):
    basis = basis(groups.get(group), size)
    weight = torch.randn(2, 1, *basis.parameters, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: bases.expand(w, basis), weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: bases.expand(w, basis), weight)


# --- quotient fields ---


def quotient_filters(group, size, inner, outer, name):
    """The filters of one pair of fields, one for each parameter: (parameters, |G/K|, |G/H|, k, k)."""
    G = groups.get(group)
    basis = bases.quotient_basis(G, size, groups.get(inner), groups.get(outer), name)
    count = torch.Size(basis.parameters).numel()
    filters = bases.expand(torch.eye(count).view(-1, 1, *basis.parameters), basis)
    return filters.view(count, -1, G.order // groups.get(inner).order, size, size).double()


# Stabilizers of a coset that are rotations, reflections, both and neither, on normal subgroups and on others.
QUOTIENTS = [
    *(("p4", h, k) for h in ("c1", "c2", "p4") for k in ("c1", "c2", "p4")),
    *(("c8", h, k) for h, k in (("c1", "c2"), ("c2", "c4"), ("c4", "c2"), ("c8", "c4"), ("c4", "c8"), ("c8", "c8"))),
    *(("p4m", h, k) for h in ("c1", "d1", "c2", "d2", "p4m") for k in ("d1", "c4", "d2", "p4m")),
    *(("d8", h, k) for h, k in (("c1", "d1"), ("d1", "d1"), ("d2", "d1"), ("c2", "d4"), ("d8", "d2"))),
    *(("d6", h, k) for h, k in (("d1", "d3"), ("d2", "d1"), ("c3", "d2"))),
    *(("c2", "c1", "c2"), ("c3", "c1", "c3"), ("d1", "c1", "d1"), ("d2", "d1", "d1"), ("d3", "d1", "d1")),
]


@pytest.mark.parametrize(("group", "inner", "outer"), QUOTIENTS)
def test_steerable_filters_between_quotient_fields_are_as_many_as_escnns_and_span_them(group, inner, outer):
    ours = torch.nn.functional.normalize(quotient_filters(group, 3, inner, outer, "steerable").flatten(1), dim=1)
    G = groups.get(group)
    theirs = escnns_filters(G.quotient_type({inner: 1}), G.quotient_type({outer: 1}), 3)
    ranks = [
        torch.linalg.matrix_rank(filters, rtol=1e-5).item() for filters in (ours, theirs, torch.cat([ours, theirs]))
    ]
    assert ranks == [len(ours)] * 3
    assert len(theirs) == len(ours)


def test_the_filters_to_another_quotient_of_the_same_order_span_something_else():
    rotations, reflections = (quotient_filters("p4m", 3, "c1", outer, "steerable").flatten(1) for outer in ("c2", "d1"))
    assert torch.linalg.matrix_rank(torch.cat([rotations, reflections]), rtol=1e-5) > len(rotations)


def move_cosets(filters, group, inner, outer, g):
    """The filters K(g^-1 rK, g^-1 xH, g^-1 y)."""
    G = groups.get(group)
    inverse = G.inverse(g)
    for dim, subgroup in ((1, outer), (2, inner)):
        cosets = G.cosets(groups.get(subgroup))
        number = {h: i for i, coset in enumerate(cosets) for h in coset}
        filters = filters.index_select(dim, torch.tensor([number[G.multiply(inverse, coset[0])] for coset in cosets]))
    return G.transform_image(filters, g)


@pytest.mark.parametrize(("group", "inner", "outer"), QUOTIENTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_filters_between_quotient_fields_are_equivariant_to_the_last_bit(group, inner, outer, size):
    for name in ("pixel", "steerable") if groups.get(group).on_grid else ("steerable",):
        filters = quotient_filters(group, size, inner, outer, name)
        assert len(filters) > 0
        for g in groups.get(group).grid_elements:
            assert move_cosets(filters, group, inner, outer, g).equal(filters)


def test_a_quotient_filter_with_one_tap_changed_is_not_equivariant():
    filters = quotient_filters("p4", 3, "c1", "c2", "pixel")
    filters[0, 0, 0, 0, 0] += 1
    assert not move_cosets(filters, "p4", "c1", "c2", 1).equal(filters)


@pytest.mark.parametrize(("group", "inner", "outer"), [q for q in QUOTIENTS if groups.get(q[0]).on_grid])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_pixel_basis_between_quotient_fields_is_all_of_the_equivariant_filters(group, inner, outer, size):
    # As for regular fields: the dimension of the fixed space is the mean trace.
    filters = quotient_filters(group, size, inner, outer, "pixel")
    index = torch.arange(filters[0].numel()).view(1, *filters.shape[1:])
    traces = [(move_cosets(index, group, inner, outer, g) == index).sum().item() for g in elements(group)]
    assert torch.linalg.matrix_rank(filters.flatten(1)) == len(filters) == sum(traces) / len(traces)


@pytest.mark.parametrize(("group", "inner", "outer"), [("p4", "c2", "c2"), ("p4m", "c1", "d1"), ("p4m", "d2", "d2")])
def test_filters_between_quotient_fields_are_those_between_regular_fields_averaged_over_cosets(group, inner, outer):
    G = groups.get(group)
    regular = bases.expand(torch.eye(9 * G.order).view(-1, 1, G.order, 3, 3), bases.regular_basis(G, 3))
    regular = regular.view(9 * G.order, G.order, G.order, 3, 3).double()
    averaged = regular[:, G.cosets(groups.get(outer))].mean(2)[:, :, G.cosets(groups.get(inner))].mean(3).flatten(1)
    ours = quotient_filters(group, 3, inner, outer, "pixel").flatten(1)
    ranks = [torch.linalg.matrix_rank(filters).item() for filters in (ours, averaged, torch.cat([ours, averaged]))]
    assert ranks == [len(ours)] * 3


def test_between_regular_fields_the_basis_is_the_regular_one():
    G, e = groups.get("c8"), groups.get("c1")
    assert bases.quotient_basis(G, 3, e, e) is bases.regular_basis(G, 3, None)
    with pytest.raises(ValueError, match=r"c8 .* has no pixel basis"):
        bases.quotient_basis(G, 3, groups.get("c2"), e, "pixel")
    with pytest.raises(ValueError, match="c3 is no subgroup of p4"):
        bases.quotient_basis(groups.get("p4"), 3, groups.get("c3"), e)
