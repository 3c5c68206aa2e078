"""What several test files share: random fields, the action on them, and errors of values and gradients."""

import copy
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from gzoo import groups, transform_features
from gzoo.check import relative_error
from gzoo.groups import Group
from gzoo.registry import ENTRIES, Entry

if TYPE_CHECKING:
    from escnn.nn import FieldType

PLAIN = {entry.backbone for entry in ENTRIES if entry.group is None}
_STEERABLE_CORE = ("resnet20", "cnn7", "resnet18", "convnext_atto")


def core_entries() -> list[Entry]:
    """The entries that every run of the tests builds: our own backbones, and three of timm. tests/test_zoo has all.

    Of those that differ in depth alone, one.
    """
    timms = ("resnet18", "resnet50", "convnext_atto")
    others = {"wrn28_10", "resnet32", "resnet44", "resnet56", "resnet110", "sfcnn"}
    return [
        entry
        for entry in ENTRIES
        if (entry.backbone in timms or entry.backbone in PLAIN - others)
        and (entry.group in (None, "p4", "p4m") or entry.backbone in _STEERABLE_CORE)
    ]


def shallow(name: str) -> dict[str, tuple[int, ...]]:
    """Options with which an entry of timm's, by its name or that of its backbone, has a block in each stage."""
    blocks = {"resnet18": "layers", "resnet50": "layers", "convnext_atto": "depths"}
    return {key: (1, 1, 1, 1) for backbone, key in blocks.items() if name.endswith(backbone)}


GRID_GROUPS = ("c1", "p4", "d2", "p4m")  # with the trivial group, and with reflections, but not all turns


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_configure() -> None:
    # Of the processes that run the tests: else memory is given back and fetched again all the time, a sixth of it.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


class Network(nn.Module):
    """Layers by name and a forward given as a function."""

    def __init__(self, forward: Callable, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Calling(nn.Module):
    """A module of one's own without weights, which calls a function."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def elements(group: str) -> range:
    return range(groups.get(group).order)


def random_fields(group: str, fields: int, size: tuple[int, int] = (5, 5), batch: int = 2) -> Tensor:
    """Regular fields, float64."""
    return torch.randn(batch, fields * groups.get(group).order, *size, dtype=torch.float64)


def random_image(channels: int, size: tuple[int, int] = (5, 5), batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64)


def act(group: Group, law: "str | FieldType", x: Tensor, g: int) -> Tensor:
    """g.x for an "image", regular "fields", "channels last" fields, "vectors", what is "invariant", or of a type."""
    if not isinstance(law, str):
        return transform_features(x, g, law)
    if law == "image":
        return group.transform_image(x, g)
    if law == "fields":
        return group.transform_features(x, g)
    if law == "vectors":
        return group.transform_vectors(x, g)
    if law == "channels last":
        return group.transform_features(x.movedim(-1, 1), g).movedim(1, -1)
    assert law == "invariant"
    return x


def worst_error(
    layer: nn.Module,
    group: str,
    x: Tensor,
    law: "str | FieldType" = "fields",
    out_law: "str | FieldType | None" = None,
    elements: Iterable[int] | None = None,
) -> float:
    """The largest relative error over ``elements``, by default all that fit the grid: of the value, of the gradient for
    the input, and of the gradients for the parameters, which must be the same for x and g.x."""
    G = groups.get(group)
    worst = 0.0
    x = x.requires_grad_()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    y = layer(x)
    cotangent = torch.randn_like(y)
    input_gradient, *gradients = torch.autograd.grad(y, (x, *parameters), cotangent)
    for g in G.grid_elements if elements is None else elements:
        turned = act(G, law, x.detach(), g).requires_grad_()
        y_g = layer(turned)
        worst = max(worst, relative_error(y_g, act(G, out_law or law, y, g)))
        turned_gradient, *turned_gradients = torch.autograd.grad(
            y_g, (turned, *parameters), act(G, out_law or law, cotangent, g)
        )
        worst = max(worst, relative_error(turned_gradient, act(G, law, input_gradient, g)))
        if parameters:  # one scale for all: a bias in front of an instance norm has no gradient but rounding
            worst = max(worst, relative_error(_joined(turned_gradients), _joined(gradients)))
    return worst


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def with_random_statistics(model: nn.Module) -> nn.Module:
    """A float64 copy in which all that starts constant, and so hides errors, is random: norms, biases, layer scales."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim <= 1:
                # Both signs where a constant would drown the image.
                tensor.copy_(torch.rand_like(tensor) + (-0.5 if name.endswith(("bias", "mean")) else 0.5))
    return model


def without(model: nn.Module, attribute: str) -> nn.Module:
    """A copy of ``model`` in which no layer has what it calls ``attribute``: the fully equivariant network."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, attribute, None) is not None:
            setattr(module, attribute, None)
    return model
