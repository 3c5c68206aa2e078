"""Networks that give directions, such as a flow: rotate the image, and they turn with it."""

import pytest
import timm
import torch
from torch import Tensor, nn

import gzoo
from gzoo import DoubleAngle, groups
from gzoo.check import relative_error
from gzoo.nn import VectorPool
from tests.conftest import GRID_GROUPS, Network, random_image, shallow, with_random_statistics

SIZES = ((16, 16), (17, 17), (13, 18))


class Instances(nn.Module):
    """Offsets to the centre of an object beside its class, as networks for nuclei and cells give them."""

    def __init__(self, kernel_size: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        )
        self.offset = nn.Conv2d(32, 2, kernel_size, padding="same")
        self.kind = nn.Conv2d(32, 5, 1)
        self.up = nn.ConvTranspose2d(32, 3, 2, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"offset": torch.tanh(self.offset(y)), "kind": self.kind(y), "cells": self.up(y)}


class Joined(Instances):
    """All in one tensor, as Cellpose gives flow and probability."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return nn.functional.interpolate(torch.cat((self.kind(y), self.offset(y)), 1), x.shape[2:], mode="bilinear")


VECTORS = {"offset": [(0, 1)], "up": [(2, 0)]}


def joined(kernel_size: int = 1) -> nn.Module:
    model = Joined(kernel_size)
    del model.up
    return model


@pytest.mark.parametrize(("group", "kernel_size"), [*((group, 1) for group in GRID_GROUPS), ("p4m", 3), ("d8", 3)])
def test_vectors_turn_with_the_image_in_value_and_gradient(group, kernel_size):
    model = gzoo.convert(Instances(kernel_size), group, vectors=VECTORS)
    model = with_random_statistics(model).eval()
    G = model.group
    for size in SIZES:
        x = random_image(3, size).requires_grad_()
        y = model(x)
        weights = {key: torch.randn_like(value) for key, value in y.items()}
        (gradient,) = torch.autograd.grad(sum((weights[key] * y[key]).sum() for key in y), x)
        for g in G.grid_elements:

            def moved(y, g=g):
                return {
                    "offset": G.transform_vectors(y["offset"], g),
                    "kind": G.transform_image(y["kind"], g),
                    "cells": G.transform_vectors(y["cells"], g, [(2, 0)]),
                }

            turned = G.transform_image(x, g).detach().requires_grad_()
            z, expected, laws = model(turned), moved(y), moved(weights)
            (turned_gradient,) = torch.autograd.grad(sum((laws[key] * z[key]).sum() for key in z), turned)
            assert max(relative_error(z[key], expected[key]) for key in z) < 1e-12
            assert relative_error(turned_gradient, G.transform_image(gradient, g)) < 1e-12
    assert gzoo.check(model, (13, 18)).worst < 1e-12


class Boxes(nn.Module):
    """Distances to the sides of a box, as anchor-free detectors give them, and rays to the border of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.box, self.bins, self.rays = nn.Conv2d(32, 4, 3, padding=1), nn.Conv2d(32, 12, 1), nn.Conv2d(32, 16, 1)
        self.kind, self.oriented = nn.Conv2d(32, 5, 1), nn.Conv2d(32, 7, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.body(x)).relu()
        shares = self.bins(y).unflatten(1, (4, 3)).softmax(2)  # of each distance, as in distribution focal loss
        named = {"box": self.box(y).exp(), "bins": shares.flatten(1, 2), "rays": nn.functional.softplus(self.rays(y))}
        return named | {"oriented": self.oriented(y), "kind": self.kind(y)}


BINS = [(i, 3 + i, 6 + i, 9 + i) for i in range(3)]
ORIENTED = [DoubleAngle(6, 4), (0, 1), (2, 3, 2, 3)]  # where the long side points, offset, width and height; a class
DIRECTIONS = {"box": [(0, 1, 2, 3)], "bins": BINS, "rays": [tuple(range(16))], "oriented": ORIENTED}


@pytest.mark.parametrize("group", [*GRID_GROUPS, "d2"])
def test_distances_to_the_sides_change_places_as_the_image_turns(group):
    model = with_random_statistics(gzoo.convert(Boxes(), group, vectors=DIRECTIONS)).eval()
    for size in SIZES:
        x = random_image(3, size)
        y = model(x)
        for g in model.group.grid_elements:
            z = model(model.group.transform_image(x, g))
            for name, vectors in (DIRECTIONS | {"kind": ()}).items():
                assert relative_error(z[name], model.group.transform_vectors(y[name], g, vectors)) < 1e-12
        assert gzoo.check(model, size).worst < 1e-12
    left, top, right, bottom = model(x)["box"].unbind(1)
    extents = model(x)["oriented"][:, 2:4]
    assert relative_error(*extents.unbind(1)) > 0.01
    if group == "p4":  # counterclockwise, what was above is at the left
        turned = model(x.rot90(1, (2, 3)))["box"]
        assert relative_error(turned, torch.stack((top, right, bottom, left), 1).rot90(1, (2, 3))) < 1e-12
        exchanged = model(x.rot90(1, (2, 3)))["oriented"][:, 2:4]
        assert relative_error(exchanged, extents.flip(1).rot90(1, (2, 3))) < 1e-12
    if group == "d1":
        mirrored = model(x.flip(3))["box"]
        assert relative_error(mirrored, torch.stack((right, top, left, bottom), 1).flip(3)) < 1e-12


def test_transferred_distances_are_the_mean_of_the_plain_ones_turned_back():
    plain = Boxes().eval()
    model = gzoo.convert(plain, "p4m", weights="transfer", vectors=DIRECTIONS).eval()
    x, G = torch.randn(1, 3, 17, 17), model.group
    poses = [plain.down(plain.body(G.transform_image(x, G.inverse(g)))).relu() for g in range(8)]
    for name, activation in (("rays", nn.functional.softplus), ("oriented", nn.Identity())):
        layer = plain.get_submodule(name)
        turned = [G.transform_vectors(layer(pose), g, DIRECTIONS[name]) for g, pose in enumerate(poses)]
        assert relative_error(model(x)[name], activation(torch.stack(turned).mean(0))) < 1e-5


def test_directions_between_which_a_group_turns_are_refused():
    gzoo.convert(Boxes(), "c8", vectors={"rays": DIRECTIONS["rays"]})  # 16 rays, which 8 turns permute
    with pytest.raises(ValueError, match=r"box: c8 takes some of 4 directions between two others; .* multiples of 8"):
        gzoo.convert(Boxes(), "c8", vectors=DIRECTIONS)
    with pytest.raises(ValueError, match=r"oriented: c8 takes some of 4 directions between two others"):
        gzoo.convert(Boxes(), "c8", vectors={"oriented": [(2, 3, 2, 3)]})
    with pytest.raises(ValueError, match=r"d1 takes some of 3 directions between two others; .* multiples of 2"):
        groups.get("d1").turn(1, 3)


@pytest.mark.parametrize("group", ["p4m", "c8", "d6"])
@pytest.mark.parametrize(("numbers", "frequency"), [(2, 1), (2, 2), (24, 1)])
def test_the_turns_of_directions_are_a_representation(group, numbers, frequency):
    G = groups.get(group)
    matrices = [torch.tensor(G.turn(g, numbers, frequency)).double() for g in range(G.order)]
    for g in range(G.order):
        for h in range(G.order):
            assert torch.allclose(matrices[G.multiply(g, h)], matrices[g] @ matrices[h], atol=1e-12)


def test_more_directions_turn_as_the_vectors_that_they_are_along():
    """Of a vector as many numbers as there are directions: how far it goes along each."""
    G, vector = groups.get("d6"), torch.randn(5, 2, dtype=torch.float64)
    angles = torch.arange(12, dtype=torch.float64) * torch.pi / 6
    along = torch.stack((-angles.cos(), -angles.sin()))  # (right, down): left first, then up
    for g in range(12):
        turned = G.transform_vectors(vector, g) @ along
        assert torch.allclose(turned, G.transform_vectors(vector @ along, g, [tuple(range(12))]), atol=1e-12)


@pytest.mark.parametrize("group", ["d6", "d8"])
def test_a_double_angle_turns_as_twice_the_angle_of_a_vector(group):
    G, vector = groups.get(group), torch.randn(5, 2, dtype=torch.float64)

    def doubled(vector: Tensor) -> Tensor:
        angle = 2 * torch.atan2(vector[:, 1], vector[:, 0])
        return torch.stack((angle.sin(), angle.cos()), 1) * vector.norm(dim=1, keepdim=True)

    for g in range(G.order):
        turned = G.transform_vectors(doubled(vector), g, [DoubleAngle(cosine=1, sine=0)])
        assert torch.allclose(turned, doubled(G.transform_vectors(vector, g)), atol=1e-12)


def test_a_double_angle_is_equivarified_too():
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).double()
    model, x = gzoo.equivarify(plain, "p4m", vectors=[DoubleAngle(0, 1)]), random_image(3, (9, 9))
    for g in range(8):
        turned = model.group.transform_vectors(model(x), g, [DoubleAngle(0, 1)])
        assert relative_error(model(model.group.transform_image(x, g)), turned) < 1e-12
    assert relative_error(model(x.rot90(1, (2, 3))), -model(x)) < 1e-12


def test_without_vectors_the_same_layers_give_numbers_that_do_not_turn():
    model = with_random_statistics(gzoo.convert(joined(), "p4")).eval()
    x = random_image(3, (16, 16))
    y, z = model(x)[:, 5:], model(x.rot90(1, (2, 3)))[:, 5:]
    assert relative_error(z, y.rot90(1, (2, 3))) < 1e-12
    assert relative_error(z, model.group.transform_vectors(y, 1)) > 0.1


@pytest.mark.parametrize("turns", [torch.eye(2).expand(4, 2, 2), None])
def test_vectors_that_do_not_turn_or_turn_the_wrong_way_are_found(turns):
    for make, vectors in ((Instances, VECTORS), (joined, {"offset": [(0, 1)]})):
        model = with_random_statistics(gzoo.convert(make(), "p4", vectors=vectors)).eval()
        assert gzoo.check(model, (8, 10)).worst < 1e-12
        pool = model.offset[1]
        pool.turns = pool.turns.mT if turns is None else turns.double()
        assert gzoo.check(model, (8, 10)).worst > 0.1


@pytest.mark.parametrize("group", ["c2", "d1", "p4"])
def test_logits_that_behave_as_vectors_are_found(group):
    class Shaded(Instances):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = super().forward(x)
            side = torch.linspace(-1, 1, y["kind"].shape[-1], dtype=x.dtype)
            return y | {"kind": y["kind"][:, :2] * torch.stack((side, side))[:, None]}

    with pytest.raises(ValueError, match="is not equivariant under"):
        gzoo.convert(Shaded(), group, vectors=VECTORS, classifier=["kind"])


def test_a_checkpoint_of_other_vectors_is_refused():
    def network(**options: object) -> nn.Module:
        return gzoo.convert(joined(3), "p4", **options)

    state = network(vectors={"offset": [(0, 1)]}).state_dict()
    network(vectors={"offset": [(0, 1)]}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"vectors at offset.1 are channels \[\(0, 1\)\], but the model has \[\(1,"):
        network(vectors={"offset": [(1, 0)]}).load_state_dict(state)
    doubled = network(vectors={"offset": [DoubleAngle(0, 1)]})
    with pytest.raises(ValueError, match=r"offset.1.channels is \(1, 2\), not \(1, 3\)"):
        doubled.load_state_dict(state)
    with pytest.raises(ValueError, match=r"are channels \[DoubleAngle\(cosine=0, sine=1\)\], but the model has \[Dou"):
        network(vectors={"offset": [DoubleAngle(1, 0)]}).load_state_dict(doubled.state_dict())
    with pytest.raises(ValueError, match=r"offset.1.channels is not in the model"):
        network(classifier=["offset", "kind"]).load_state_dict(state)


def test_vectors_beside_logits_in_one_map_follow_too():
    model = with_random_statistics(gzoo.convert(joined(), "p4m", vectors={"offset": [(0, 1)]})).eval()
    x = random_image(3, (16, 21))
    for g in range(8):
        y, z = model(x), model(model.group.transform_image(x, g))
        assert relative_error(z, model.group.transform_vectors(y, g, [(5, 6)])) < 1e-12
    assert gzoo.check(model, (16, 21)).worst < 1e-12


@pytest.mark.parametrize("group", ["p4", "d1"])
def test_transferred_vectors_are_the_mean_of_the_plain_ones_turned_back(group):
    plain = with_random_statistics(Instances(3)).eval()
    model = gzoo.convert(plain, group, weights="transfer", vectors=VECTORS)
    G, x = model.group, random_image(3, (17, 17))
    poses = [plain(G.transform_image(x, G.inverse(g))) for g in range(G.order)]
    for key, pairs in (("offset", [(0, 1)]), ("cells", [(2, 0)])):
        turned = [
            G.transform_vectors(y[key].atanh() if key == "offset" else y[key], g, pairs) for g, y in enumerate(poses)
        ]
        mean = torch.stack(turned).mean(0)
        assert relative_error(model(x)[key], mean.tanh() if key == "offset" else mean) < 1e-9


@pytest.mark.parametrize("weights", [None, "transfer"])
def test_a_linear_layer_may_give_a_vector_for_the_whole_image(weights):
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    plain = nn.Sequential(*layers).double()
    model = gzoo.convert(plain, "p4m", weights=weights, vectors={"4": [(2, 1)]})
    G, x = model.group, random_image(3, (8, 11))
    y = model(x)
    for g in range(G.order):
        assert relative_error(model(G.transform_image(x, g)), G.transform_vectors(y, g, [(2, 1)])) < 1e-12
    assert gzoo.check(model, (8, 11)).worst < 1e-12
    if weights:
        poses = [plain(G.transform_image(x, G.inverse(g))) for g in range(G.order)]
        mean = torch.stack([G.transform_vectors(z, g, [(2, 1)]) for g, z in enumerate(poses)]).mean(0)
        assert relative_error(y, mean) < 1e-12


def test_the_classifier_of_a_timm_network_may_give_a_vector():
    plain = timm.create_model("convnext_atto", num_classes=3, **shallow("convnext_atto"))
    model = gzoo.convert(plain, "p4", vectors={"head.fc": [(2, 1)]}).double().eval()
    x = random_image(3, (33, 33), 1)
    for g in range(4):
        turned = model.group.transform_vectors(model(x), g, [(2, 1)])
        assert relative_error(model(model.group.transform_image(x, g)), turned) < 1e-10
    assert gzoo.check(model, 33).worst < 1e-10


def test_a_flow_is_learned_which_numbers_cannot_be():
    """The slope of a smooth image: of numbers that only move, the best guess is none, whose error is 1."""

    def error(**options: object) -> float:
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1)
        model = gzoo.convert(nn.Sequential(*layers), "p4", **options)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(150):
            noise = torch.randn(8, 1, 20, 20)
            slope = torch.cat([noise.roll(-1, axis) - noise.roll(1, axis) for axis in (3, 2)], 1)
            loss = (model(noise) - slope)[..., 2:-2, 2:-2].square().mean() / slope.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert error(vectors={"2": [(0, 1)]}) < 0.1
    assert error(classifier="2") > 0.9


def test_vectors_survive_a_round_trip_through_escnn_and_an_export():
    model = gzoo.convert(joined(), "p4m", vectors={"offset": [(0, 1)]}).eval()
    x = torch.randn(1, 3, 16, 16)
    twin = gzoo.to_escnn(model)
    for other in (twin, gzoo.from_escnn(twin), torch.export.export(model, (x,)).module()):
        assert torch.allclose(other(x), model(x), atol=1e-5)


def test_growth_takes_the_mean_of_the_smaller_networks_vectors():
    small, large = (
        gzoo.convert(joined(), group, "width", vectors={"offset": [(0, 1)]}).eval() for group in ("c2", "p4m")
    )
    gzoo.grow(large, small)
    G, x = large.group, torch.randn(1, 3, 16, 16)
    turns = [coset[0] for coset in G.cosets(small.group)]
    poses = [G.transform_vectors(small(G.transform_image(x, G.inverse(g))), g, [(5, 6)]) for g in turns]
    assert torch.allclose(large(x), torch.stack(poses).mean(0), atol=1e-6)


def test_the_meta_device_keeps_the_turns():
    with torch.device("meta"):
        pool = VectorPool(groups.get("p4"), [(0, 1)])
    assert pool.to_empty(device="cpu").turns.tolist()[1] == [[0, 1], [-1, 0]]
    assert pool(torch.randn(1, 8)).shape == (1, 2)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([(0, 1)], "it takes channels by path, as in {'flow': "),
        ({"ofset": [(0, 1)]}, "takes the path of a convolution or Linear of Instances that makes vectors"),
        ({"body.1": [(0, 1)]}, "takes the path of a convolution or Linear of Instances that makes vectors"),
        ({"offset": []}, "and its channels"),
        ({"offset": [(0,)]}, "accepted are pairs"),
        ({"offset": [(0, 2)]}, r"vectors of offset: .* of two of the 2 channels"),
        ({"offset": [DoubleAngle(0, 0)]}, "each channel in one at most"),
        ({"offset": [(0, 1, 1, 0)]}, "each channel in one at most"),
        ({"kind": [(0, 1, 0, 1), (1, 2)]}, "each channel in one at most"),
        ({"body.0": [(0, 1)]}, "'body.0', whose channels 'body.3' reads"),
    ],
)
def test_vectors_that_no_layer_makes_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        gzoo.convert(Instances(), "p4", vectors=vectors)


def arrows(run):
    """A convolution, and the layer ``arrow`` behind it, which ``run`` calls."""
    return Network(run, body=nn.Conv2d(3, 8, 3, padding=1), arrow=nn.Linear(8, 2))


def test_the_angle_of_a_vector_is_no_output():
    def angle(self, x):
        right, down = self.arrow(self.body(x).relu().mean((2, 3))).T
        return torch.atan2(down, right)

    with pytest.raises(ValueError, match=r"Angles, activations and scales of vectors are to be taken outside"):
        gzoo.convert(arrows(angle), "p4", vectors={"arrow": [(0, 1)]})


def test_a_linear_layer_at_each_pixel_makes_no_vectors():
    plain = arrows(lambda self, x: self.arrow(self.body(x).relu().permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="'arrow', which is linear at each pixel; use a 1x1 convolution"):
        gzoo.convert(plain, "p4", vectors={"arrow": [(0, 1)]})


@pytest.mark.parametrize("options", [{"partial": True}, {"head": "pose"}, {"weights": "project"}])
def test_vectors_do_not_go_with_what_gives_none(options):
    with pytest.raises(ValueError, match="does not go with partial=True, head='pose' and weights='project'"):
        gzoo.convert(Instances(), "p4", vectors=VECTORS, **options)


def test_what_makes_numbers_of_vectors_is_refused():
    class Clipped(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = Clipped()
    del model.up
    with pytest.raises(ValueError, match="output of EquivariantClipped is not equivariant under p4"):
        gzoo.convert(model, "p4", vectors={"offset": [(0, 1)]})
