"""Partial equivariance: each group convolution learns which elements of the group it keeps.

`make_partial` gives the layers of a converted network a `Subset` each, `report` says what they learned, `plot` draws
it. Where a norm follows the convolution, the subset stands in the norm; what is dropped behind it is never seen, as if
the convolution had dropped it. Norms of single fields (batch, group, instance norm) take their statistics over the
kept elements only, norms over channels (layer norm, GRN) over the whole fibre: the same for all poses of an image.

The networks of `gzoo.continuous` learn an interval of rotations in each layer; `report` and `plot` show it, too.

Source: Romero & Lohit 2022, "Learning Partial Equivariances From Data", arXiv:2110.10211.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from gzoo.equivariant import removing, tensors_in
from gzoo.groups import Group
from gzoo.nn import (
    Arc,
    FibreNorm,
    GroupCondConv2d,
    GroupConv2d,
    GroupConvTranspose2d,
    GroupLinear,
    GroupMapLinear,
    GroupMapNorm,
    GroupPool,
    LiftingConv2d,
    PerElement,
    Subset,
)
from gzoo.nn.fibre import shared_along_fibre
from gzoo.nn.linear import Pooling
from gzoo.nn.norm import channel_dim

_MAPS = (LiftingConv2d, GroupConv2d, GroupCondConv2d, GroupConvTranspose2d, GroupLinear)


def make_partial(model: nn.Module, group: Group, pool: Pooling, x: Tensor) -> None:
    """Gives the layers of ``model``, in place, subsets of the group to learn; they start with all of it.

    Every norm of fibres has one, and so has every convolution or linear map from which a dropped element would reach
    another one, the head or the output past all norms. A gate, as of squeeze-and-excite, needs none: it multiplies
    zeros.

    Args:
        model: a converted network.
        group: its group.
        pool: how its head pools a fibre.
        x: images (B, C, H, W) that it takes.

    Raises:
        ValueError: the head pools by the maximum, in which the zeros of dropped elements would count; or a layer
            makes other numbers of those zeros: a norm of each element by itself or of a flattened map, attention
            between channels, an activation with f(0) != 0; or the network is on the meta device, or made in
            inference mode. Names the layer.
    """
    if pool != "mean":
        raise ValueError(
            "partial=True needs group_pool='mean': dropped elements are zeros, which a mean leaves out and the maximum "
            "does not"
        )
    if x.is_meta or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "partial=True runs the network, which the meta device cannot; create it on the CPU, then move it"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("partial=True takes a derivative; create the network outside torch.inference_mode()")
    names = {module: name for name, module in model.named_modules()}
    if flattened := [name for module, name in names.items() if isinstance(module, GroupMapNorm)]:
        raise ValueError(f"{flattened[0]} is a norm of a flattened map, which cannot leave elements out; norm the map")
    norms: dict[nn.Module, None] = {}  # ordered by execution; without those of the image

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, PerElement):
            raise ValueError(
                f"{names[module]} normalises each element by itself, and so makes other numbers of the zeros at those "
                "that a layer drops, which weights='transfer' asks for; leave that out"
            )
        norms[module] = None

    watched = [
        module
        for module in model.modules()
        if isinstance(module, PerElement | FibreNorm)
        or (
            shared_along_fibre(module)
            and (hasattr(module, "normalized_shape") or isinstance(module, GlobalResponseNorm))
        )
    ]
    with torch.no_grad():
        _run(model, x, [module.register_forward_hook(after) for module in watched])
    _learn_subsets(norms, group, x)
    _learn_subsets(_unkept_maps(model, group, x), group, x)
    if (reader := _first_unkept(model, group, x)) is not None:
        raise ValueError(
            f"{names[reader]} would see dropped elements as other numbers than zero; the cause is in front of it: an "
            "activation with f(0) != 0, such as sigmoid or softplus (ReLU, SiLU, GELU and tanh are 0 there), an "
            "offset, padding with a number, attention between channels, or the image beside feature maps"
        )


def _learn_subsets(layers: Iterable[nn.Module], group: Group, x: Tensor) -> None:
    for layer in layers:
        parameter = next(layer.parameters(), x)
        subset = Subset(group).to(parameter.device, parameter.dtype)
        if isinstance(layer, FibreNorm):
            layer.subset = subset
        elif isinstance(layer, _MAPS):
            subset.follow(layer, channels_last=isinstance(layer, GroupLinear))
        else:
            subset.follow(layer, channels_last=channel_dim(layer) == -1)


def _dropped(module: nn.Module | None, y: Tensor, group: Group) -> Tensor:
    """The channels of all elements but the identity, in what a layer gives or takes."""
    channels = y.movedim(-1, 1) if isinstance(module, GroupLinear) else y
    return channels.unflatten(1, (-1, group.order))[:, :, 1:]


def _given(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer is given, as (B, C, ...) also where it is a flattened map."""
    return x.unflatten(1, (module.in_channels, -1)) if isinstance(module, GroupMapLinear) else x


def _unkept_maps(model: nn.Module, group: Group, x: Tensor) -> list[nn.Module]:
    """The maps from which a dropped element reaches another one, the head or the output past the subsets there are.

    Found by a derivative: of what those see at dropped elements with respect to what each map gives there.
    """
    given: dict[nn.Module, list[Tensor]] = {}  # by a layer that is called twice, two
    seen: list[Tensor] = []

    def cut(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        leaf = y.detach().requires_grad_()
        given.setdefault(module, []).append(leaf)
        return leaf.clone()  # which an activation may overwrite

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(_weighed(_dropped(module, _given(module, inputs[0]), group)))

    maps = [module for module in model.modules() if isinstance(module, _MAPS)]
    handles = [module.register_forward_hook(cut) for module in maps]
    handles += [module.register_forward_pre_hook(look) for module in _readers(model)]
    with torch.enable_grad():
        output = _run_dropping(model, group, x, handles)
        for y in tensors_in(output):
            if y.ndim > 1 and y.shape[1] % group.order == 0:
                # May be fibres; if it is not, the head saw them before.
                seen.append(_weighed(_dropped(None, y, group)))
        total = sum(seen, torch.zeros(()))
        if total.requires_grad:
            total.backward()
    return [
        module
        for module, leaves in given.items()
        if any(leaf.grad is not None and _dropped(module, leaf.grad, group).any() for leaf in leaves)
    ]


def _weighed(values: Tensor) -> Tensor:
    """A sum with irregular weights, in which nothing cancels."""
    weights = torch.arange(values.numel(), dtype=values.dtype, device=values.device).cos()
    return (values.flatten() * weights).sum()


def _first_unkept(model: nn.Module, group: Group, x: Tensor) -> nn.Module | None:
    """The first layer that would see anything but zeros at the elements that the subsets of ``model`` drop."""
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if _dropped(module, _given(module, inputs[0]), group).any():
            found.append(module)

    with torch.no_grad():
        _run_dropping(model, group, x, [module.register_forward_pre_hook(look) for module in _readers(model)])
    return found[0] if found else None


def _readers(model: nn.Module) -> list[nn.Module]:
    """The layers that sum over fibres."""
    return [m for m in model.modules() if isinstance(m, (*_MAPS, GroupPool)) and not isinstance(m, LiftingConv2d)]


def _run_dropping(model: nn.Module, group: Group, x: Tensor, handles: list[RemovableHandle]) -> Any:
    """`_run` with subsets that keep the identity alone, and ones for zeros that training may change: biases, gains."""
    learned = [subset for _, subset in subsets(model) if isinstance(subset, Subset)]
    for subset in learned:
        subset.keep([0])
    changed = {name: p.detach().where(p.detach() != 0, 1.0) for name, p in model.named_parameters()}
    output = _run(model, x, handles, changed)
    for subset in learned:
        subset.keep(range(group.order))
    return output


def _run(model: nn.Module, x: Tensor, handles: list[RemovableHandle], changed: dict[str, Tensor] | None = None) -> Any:
    """The network on x in eval mode, with some parameters ``changed``, under hooks that are gone afterwards."""
    training = [module for module in model.modules() if module.training]
    with removing(handles):
        try:
            return functional_call(model.eval(), changed or {}, x)
        finally:
            for module in training:
                module.training = True


def subsets(model: nn.Module) -> Iterator[tuple[str, Subset | Arc]]:
    """The subsets that a partial network learns, each with the path of the layer that it stands in."""
    for name, module in model.named_modules():
        if isinstance(module, Subset) or (isinstance(module, Arc) and module.partial):
            yield name.removesuffix(".subset").removesuffix(".arc"), module


def subset_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the subsets of a partial network learn, in the order of its layers; nothing in another network."""
    return [parameter for _, subset in subsets(model) for parameter in subset.parameters()]


def parameter_groups(model: nn.Module, rate: float, subset_rate: float) -> list[dict[str, Any]]:
    """The parameters of any network for an optimizer, with a rate of their own for subsets, and no decay of those.

    Args:
        model: a network, partial or not.
        rate: learning rate of the weights.
        subset_rate: learning rate of the subsets. Adam moves a logit by about this much a step, and to drop an element
            it has to come from 2 to below 0.
    """
    learned = subset_parameters(model)
    apart = set(learned)
    others = [parameter for parameter in model.parameters() if parameter not in apart]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate}]
    return [*groups, {"params": learned, "lr": subset_rate, "weight_decay": 0.0}] if learned else groups


def symmetry(model: nn.Module) -> tuple[int, ...]:
    """The elements under which every layer of a partial network keeps the same subset, a subgroup.

    The network is exactly equivariant to these in eval mode, as far as the group fits the pixel grid.

    Raises:
        ValueError: the network is not partial.
    """
    common = [set(subset.symmetry) for _, subset in _require_subsets(model)]
    return tuple(sorted(set.intersection(*common)))


def _require_subsets(model: nn.Module) -> list[tuple[str, Subset | Arc]]:
    found = list(subsets(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no partial layers; create it with partial=True (gzoo.convert, or "
            "timm.create_model for a model over a group)"
        )
    return found


def report(model: nn.Module) -> str:
    """A table of the learned subsets: a row for each layer, a probability for each element; dropped ones in brackets.

    Over a continuous group: theta in degrees, and the probability of the reflected elements.

    Raises:
        ValueError: the network is not partial.
    """
    found = _require_subsets(model)
    group = found[0][1].group
    width = max(len(name) for name, _ in (*found, ("layer", None)))
    title, columns = _header(found[0][1])
    lines = [title, f"{'layer':{width}}{columns}"]
    lines += [f"{name:{width}}{_row(subset)}" for name, subset in found]
    exact = ", ".join(map(group.label, symmetry(model)))
    return "\n".join([*lines, f"all layers together: exactly equivariant to {exact}"])


def _header(subset: Subset | Arc) -> tuple[str, str]:
    """The title and the columns of a table of such subsets."""
    if isinstance(subset, Arc):
        return "kept rotations, from -theta to theta in degrees", f"{'theta':>9}{'reflected':>11}"
    group = subset.group
    return f"kept elements of {group.name}", "".join(f"{group.label(g):>9}" for g in range(group.order)) + "   |S|"


def _row(subset: Subset | Arc) -> str:
    if isinstance(subset, Arc):
        mirrored = _cell(subset.mirror_probability, subset.keeps_mirror)
        return f"{math.degrees(subset.theta):9.1f}{mirrored:>11}"
    kept = subset.kept
    cells = (_cell(subset.probability(g), g in kept) for g in range(subset.group.order))
    return f"{''.join(f'{cell:>9}' for cell in cells)}{len(kept):6}"


def _cell(probability: float, kept: bool) -> str:
    return f"{probability:.2f} " if kept else f"({probability:.2f})"


def plot(model: nn.Module, path: str | Path) -> None:
    """Draws the probabilities of `report` as an image: layers down, elements across.

    Args:
        model: a partial network.
        path: of the PNG file.

    Raises:
        ValueError: the network is not partial.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    found = [(name, _probabilities(subset)) for name, subset in _require_subsets(model)]
    labels = list(found[0][1])
    figure = Figure(figsize=(2 + 0.7 * len(labels), 1.5 + 0.35 * len(found)), layout="constrained")
    axis = figure.subplots()
    rows = [list(row.values()) for _, row in found]
    image = axis.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(labels)), labels, rotation=45)
    axis.set_yticks(range(len(found)), [name for name, _ in found])
    axis.set_xlabel("element")
    figure.colorbar(image, label="probability of being kept")
    figure.savefig(path, dpi=110)


def _probabilities(subset: Subset | Arc) -> dict[str, float]:
    """How likely an element is kept, by its name; of an interval, elements 15 degrees apart."""
    if isinstance(subset, Subset):
        return {subset.group.label(g): subset.probability(g) for g in range(subset.group.order)}
    angles = range(-180, 180, 15)
    inside = {f"{angle}": float(abs(angle) <= math.degrees(subset.theta)) for angle in angles}
    if not subset.group.reflections:
        return inside
    return inside | {f"flip {angle}": p * subset.mirror_probability for angle, p in inside.items()}
