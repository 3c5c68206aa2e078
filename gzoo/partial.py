"""Partial equivariance: each group convolution learns which elements of the group it keeps.

`make_partial` gives every group convolution of a converted network a `Subset`, `report` says what they learned, `plot`
draws it. Where a norm follows the convolution, the subset stands in the norm, which then takes its statistics over the
kept elements only; what is dropped behind the norm is never seen, as if the convolution had dropped it.

Source: Romero & Lohit 2022, "Learning Partial Equivariances From Data", arXiv:2110.10211.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gzoo.groups import Group
from gzoo.nn import FibreNorm, GroupConv2d, GroupLinear, LiftingConv2d, PerElement, Subset
from gzoo.nn.linear import Pooling


def make_partial(model: nn.Module, group: Group, pool: Pooling, x: Tensor) -> None:
    """Gives each convolution of ``model``, in place, a subset of the group to learn; they start with all of it.

    Args:
        model: a converted network.
        group: its group.
        pool: how its head pools a fibre.
        x: images (B, C, H, W) that it takes, to see which norm follows which convolution.

    Raises:
        ValueError: the head pools by the maximum, in which the zeros of dropped elements would count; or a layer mixes
            kept with dropped elements: a norm that does not follow a convolution, or that is not taken field by field,
            or a linear map along the fibre. Names the layer.
    """
    if pool != "mean":
        raise ValueError(
            "partial=True needs group_pool='mean': dropped elements are zeros, which a mean leaves out and the maximum "
            "does not"
        )
    names = {module: name for name, module in model.named_modules()}
    made_by: dict[int, nn.Module] = {}  # the convolution whose output a tensor is, by the tensor's id
    holders: dict[nn.Module, None] = {}  # ordered by execution
    alive: list[Tensor] = []  # an id is taken again when its tensor is gone

    def after(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, FibreNorm):
            convolution = made_by.get(id(inputs[0]))
            if convolution is None:
                raise ValueError(
                    f"{names[module]} normalises a map that no convolution gives directly, so its elements may be kept "
                    "by one layer and dropped by another; partial=True takes networks whose norms follow convolutions, "
                    "such as cnn7 and resnet18"
                )
            holders.pop(convolution, None)
            holders[module] = None
        elif isinstance(module, LiftingConv2d | GroupConv2d):
            alive.append(output)
            made_by[id(output)] = module
            holders[module] = None
        else:
            raise ValueError(
                f"{names[module]} is a {type(module).__name__}, which mixes the elements that a layer keeps with those "
                "that it drops; partial=True takes convolutions, batch, group and instance norms, activations with "
                "f(0) = 0, and pools, as in cnn7 and resnet18"
            )

    mixing = (LiftingConv2d, GroupConv2d, FibreNorm, GroupLinear, PerElement)
    handles = [
        module.register_forward_hook(after)
        for module in model.modules()
        if isinstance(module, mixing) or hasattr(module, "normalized_shape")
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for holder in holders:
        parameter = next(holder.parameters(), x)
        holder.subset = Subset(group).to(parameter.device, parameter.dtype)


def subsets(model: nn.Module) -> Iterator[tuple[str, Subset]]:
    """The subsets of a partial network, each with the path of the convolution or norm that it stands in."""
    for name, module in model.named_modules():
        if isinstance(module, Subset):
            yield name.removesuffix(".subset"), module


def parameter_groups(model: nn.Module, rate: float, subset_rate: float) -> list[dict[str, Any]]:
    """The parameters of any network for an optimizer, with a rate of their own for subsets, and no decay of those.

    Args:
        model: a network, partial or not.
        rate: learning rate of the weights.
        subset_rate: learning rate of the subsets. Adam moves a logit by about this much a step, and to drop an element
            it has to come from 2 to below 0.
    """
    logits = [subset.logits for _, subset in subsets(model)]
    others = [parameter for parameter in model.parameters() if all(parameter is not logit for logit in logits)]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate}]
    return [*groups, {"params": logits, "lr": subset_rate, "weight_decay": 0.0}] if logits else groups


def symmetry(model: nn.Module) -> tuple[int, ...]:
    """The elements under which every layer of a partial network keeps the same subset, a subgroup.

    The network is exactly equivariant to these in eval mode, as far as the group fits the pixel grid.

    Raises:
        ValueError: the network is not partial.
    """
    common = [set(subset.symmetry) for _, subset in _require_subsets(model)]
    return tuple(sorted(set.intersection(*common)))


def _require_subsets(model: nn.Module) -> list[tuple[str, Subset]]:
    found = list(subsets(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no partial layers; create it with partial=True (gzoo.convert, or "
            "timm.create_model for a model over a group)"
        )
    return found


def report(model: nn.Module) -> str:
    """A table of the learned subsets: a row for each layer, a probability for each element; dropped ones in brackets.

    Raises:
        ValueError: the network is not partial.
    """
    found = _require_subsets(model)
    group = found[0][1].group
    width = max(len(name) for name, _ in (*found, ("layer", None)))
    cells = [f"{group.label(g):>9}" for g in range(group.order)]
    lines = [f"kept elements of {group.name}", f"{'layer':{width}}{''.join(cells)}   |S|"]
    for name, subset in found:
        kept = subset.kept
        cells = [f"{p:.2f} " if g in kept else f"({p:.2f})" for g, p in enumerate(_probabilities(subset))]
        lines.append(f"{name:{width}}{''.join(f'{cell:>9}' for cell in cells)}{len(kept):6}")
    exact = ", ".join(map(group.label, symmetry(model)))
    return "\n".join([*lines, f"all layers together: exactly equivariant to {exact}"])


def plot(model: nn.Module, path: str | Path) -> None:
    """Draws the probabilities of `report` as an image: layers down, elements across.

    Args:
        model: a partial network.
        path: of the PNG file.

    Raises:
        ValueError: the network is not partial.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    found = _require_subsets(model)
    group = found[0][1].group
    figure = Figure(figsize=(2 + 0.7 * group.order, 1.5 + 0.35 * len(found)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow([_probabilities(subset) for _, subset in found], vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(group.order), [group.label(g) for g in range(group.order)], rotation=45)
    axis.set_yticks(range(len(found)), [name for name, _ in found])
    axis.set_xlabel(f"element of {group.name}")
    figure.colorbar(image, label="probability of being kept")
    figure.savefig(path, dpi=110)


def _probabilities(subset: Subset) -> list[float]:
    return [subset.probability(g) for g in range(subset.group.order)]
