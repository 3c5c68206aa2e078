"""Symmetry around a network instead of inside: equivarification, pose logits, and canonicalization.

`equivarify` runs a network on all |G| poses of an image; `canonicalize` lets a small equivariant network choose one.
The network itself may be anything: neither looks at its layers.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gzoo import groups
from gzoo.equivariant import group_of, like, require_network
from gzoo.groups import Directions, Group
from gzoo.nn.linear import Head, Pooling

Mode = Literal["whole", "layerwise"]


def equivarify(
    net: nn.Module,
    group: str | Group,
    head: Head = "invariant",
    pool: Pooling | nn.Module = "mean",
    batched: bool = True,
    mode: Mode = "whole",
    vectors: Directions = (),
) -> "Equivarified":
    """The G-product of any network on images: out(x)[g] = net(g^-1 x). Exact for every net, at |G| times its cost.

    The parameters are those of ``net``, which is used and not copied; a ``pool`` that is a network adds its own.

    Args:
        net: any network of images (B, C, H, W), to vectors (B, D) or maps (B, D, H', W'), one or several in tuples and
            dictionaries, such as those of torchvision.
        group: a group on the pixel grid, or its name: p4, p4m, c1, c2, d1, d2.
        head: "invariant": the poses are pooled; a map moves with the image. "pose": a value for each element
            of the group, so logits say the class and the pose.
        pool: of the poses: "mean", "max", or a network (B, C, H, W) -> (B, 1) that scores each pose of the image: its
            softmax over the group weighs the mean (lambda-equitune).
        batched: whether all poses go through ``net`` as one batch, or one after the other. That needs less memory
            without gradients; with them autograd keeps the activations of every pose, unless ``net`` checkpoints
            (timm's ``net.set_grad_checkpointing()``) and computes those of one pose at a time again. In train mode a
            batch norm takes its statistics over all poses of a batch, or over one.
        mode: "layerwise" applies each layer of an nn.Sequential to all poses before the next, "whole" the network; the
            result is the same.
        vectors: the channels of the result that are vectors (right, down), such as a flow, double angles, or numbers
            of more directions, as `gzoo.convert` has them: they are turned back like the map, as in [(0, 1)].

    Raises:
        ValueError: an option is unknown; elements of the group turn pixels between pixels; the net is no nn.Sequential.

    Source: Bao & Song 2019, arXiv:1906.07172, definition of the G-product; Basu et al. 2023, arXiv:2305.09900 for the
    learned weights.
    """
    if head not in ("invariant", "pose"):
        raise ValueError(f"head is {head!r}; accepted are 'invariant' and 'pose'")
    if not isinstance(pool, nn.Module) and pool not in ("mean", "max"):
        raise ValueError(f"pool is {pool!r}; accepted are 'mean', 'max', and a network (B, C, H, W) -> (B, 1)")
    if head == "pose" and pool != "mean":
        raise ValueError("head='pose' pools nothing; leave pool out")
    if mode not in ("whole", "layerwise"):
        raise ValueError(f"mode is {mode!r}; accepted are 'whole' and 'layerwise'")
    require_network("net", net)
    if mode == "layerwise" and type(net).forward is not nn.Sequential.forward:
        raise ValueError(
            f"mode='layerwise' needs an nn.Sequential, not a {type(net).__name__}, and no forward of its own; take "
            "mode='whole'"
        )
    groups.require_directions(vectors)  # the channels are known when it runs
    if vectors and (head == "pose" or pool == "max"):
        raise ValueError(f"vectors={vectors!r} are turned back and averaged; leave head='pose' and pool='max' out")
    return Equivarified(net, _grid_group(group), head, pool, batched, mode, vectors)


class _AroundNet(nn.Module):
    """A module around ``net`` that tells timm what the net does: ``resolve_model_data_config`` reads these."""

    net: Any

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return self.net.pretrained_cfg

    @property
    def num_classes(self) -> int:
        return self.net.num_classes

    @property
    def in_chans(self) -> int:
        return self.net.in_chans


class Equivarified(_AroundNet):
    """A network on all poses of an image; made by `equivarify`.

    Shape:
        x: (B, C, H, W), square if the group has quarter turns. "invariant": (B, D) or (B, D, H', W'), as the network's
        own, in the same tuples and dictionaries; "pose": (B, D, |G|) or (B, D, |G|, H', W'), of which
        ``flatten(1, 2)`` are regular fields.

    Raises:
        ValueError: images or maps are not square, but turned by 90 degrees; the net's output is neither vectors nor
            maps, or not of the batch, or without the channels that ``vectors`` names; the pool does not give one score
            an image.
    """

    def __init__(
        self,
        net: nn.Module,
        group: Group,
        head: Head,
        pool: Pooling | nn.Module,
        batched: bool,
        mode: Mode,
        vectors: Directions,
    ) -> None:
        super().__init__()
        self.net, self.group, self.head, self.pool = net, group, head, pool
        self.batched, self.mode, self.vectors = batched, mode, vectors

    def forward(self, x: Tensor) -> Any:
        views = poses(self.group, x)
        weights = self._weights(self.pool, views) if isinstance(self.pool, nn.Module) else None
        values: Any = views
        layers: Iterable[nn.Module] = self.net if isinstance(self.net, nn.Sequential) else (self.net,)
        for layer in layers if self.mode == "layerwise" else (self.net,):
            values = self._each(layer, values)
        _require_one(values, self.vectors)
        return _map(lambda each: self._pooled(each, weights), values)

    def _weights(self, pool: nn.Module, views: Tensor) -> Tensor:
        """(|G|, B): what the pool weighs the poses by."""
        scores = self._each(pool, views.clone())  # which a layer in place may change
        if not isinstance(scores, Tensor) or scores[0].numel() != views.shape[1]:
            given = _shape(scores[0] if isinstance(scores, Tensor) else scores)
            raise ValueError(
                f"the pool gives {given} for {views.shape[1]} images; accepted is one score an image, "
                f"{(views.shape[1], 1)}; give it a last layer with one output"
            )
        return scores.flatten(1).softmax(0)

    def _pooled(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """(|G|, B, ...), one of the network's outputs for every pose, turned back and pooled."""
        _require_output(self.group, values[0])
        if values.ndim == 5 or self.vectors:
            values = torch.stack([self.group.transform_vectors(y, g, self.vectors) for g, y in enumerate(values)])
        if self.head == "pose":
            return values.movedim(0, 2)
        if weights is not None:
            return (weights.view(*weights.shape, *(1,) * (values.ndim - 2)) * values).sum(0)
        return values.amax(0) if self.pool == "max" else values.mean(0)

    def _each(self, layer: nn.Module, values: Any) -> Any:
        """``layer`` on (|G|, B, ...), for every element of the group."""
        if not isinstance(values, Tensor):
            raise ValueError(f"{type(layer).__name__} is given a {type(values).__name__}; take mode='whole'")
        if self.batched:
            given = _on_batch(layer, values.flatten(0, 1))
            return _map(lambda y: y.unflatten(0, values.shape[:2]), given)
        # Copies where gradients flow, as autograd lets no layer change one part of a tensor in place.
        each = (_on_batch(layer, value.clone() if value.requires_grad else value) for value in values)
        return _map(lambda *parts: torch.stack(parts), *each)


def canonicalize(net: nn.Module, group: str | Group, canonizer: nn.Module, vectors: Directions = ()) -> "Canonicalized":
    """A network on the one pose that ``canonizer`` chooses: invariant at about the cost of ``net``.

    Args:
        net: as `equivarify`.
        group: as `equivarify`.
        canonizer: an equivariant network (B, C, H, W) -> (B, 1, |G|): one of the zoo with ``head="pose"`` and
            ``num_classes=1``, or what `equivarify` makes with ``head="pose"``.
        vectors: as `equivarify`.

    Raises:
        ValueError: elements of the group turn pixels between pixels; the canonizer says that it is over another group.

    Source: Mondal et al. 2023, arXiv:2310.01647 (equiadapt), after Kaba et al. 2022, arXiv:2211.06489.
    """
    require_network("net", net)
    require_network("canonizer", canonizer)
    groups.require_directions(vectors)
    group, own = _grid_group(group), group_of(canonizer)
    if own not in (None, group):  # of a group as large (p4 and d2) its scores would have the same shape
        raise ValueError(
            f"the canonizer is over {own.name}, not {group.name}; make it over {group.name}, or, if the scores that it "
            f"gives are of {group.name} after all, say so: canonizer.group = gzoo.groups.get({group.name!r})"
        )
    return Canonicalized(net, group, canonizer, vectors)


class Canonicalized(_AroundNet):
    """A network behind a canonizer; made by `canonicalize`.

    Where the highest scores of an image tie to rounding, as they do for an object that has a symmetry of its own, the
    network runs on each of those poses, and the result is the mean. The canonizer itself runs without autocast.

    In train mode it is the first of them, and its choice passes gradients straight through to the softmax of the
    scores. The prior loss, which keeps upright images upright, is
    ``pose_loss(model.canonizer(x), labels=0 for each image)``.

    Shape:
        x: (B, C, H, W), square if the group has quarter turns; result: the network's own. Vectors are invariant, maps
        are turned back and move with the image.

    Raises:
        ValueError: as `Equivarified`; or the canonizer's output is not (B, 1, |G|).
    """

    def __init__(self, net: nn.Module, group: Group, canonizer: nn.Module, vectors: Directions) -> None:
        super().__init__()
        self.net, self.group, self.canonizer, self.vectors = net, group, canonizer, vectors

    def forward(self, x: Tensor) -> Any:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # a choice, which few digits would leave to rounding
            with torch.autocast(kind, enabled=False):
                scores = self.canonizer(x.to(like(self.canonizer).dtype))
        else:
            scores = self.canonizer(x)
        rest = scores.shape[1:] if isinstance(scores, Tensor) else ()
        if rest != (1, self.group.order) or scores.shape[0] != x.shape[0]:  # a len() would fix the batch of an export
            raise ValueError(
                f"the canonizer gives {_shape(scores)}, not {(len(x), 1, self.group.order)}, a score for each element "
                f"of {self.group.name}; make it with head='pose', num_classes=1"
            )
        views = poses(self.group, x)
        if not self.training:
            return self._mean_of_best(scores[:, 0], views)
        choice = _one_hot(scores[:, 0])
        given = _on_batch(self.net, _chosen(choice, views))
        _require_one(given, self.vectors)
        return _map(lambda y: _chosen(choice, self._moved(y)) if self._moves(y) else y, given)

    def _moves(self, y: Tensor) -> bool:
        """Whether one of the network's outputs is turned back."""
        _require_output(self.group, y)
        return y.ndim == 4 or bool(self.vectors)

    def _mean_of_best(self, scores: Tensor, views: Tensor) -> Any:
        tolerance = torch.finfo(scores.dtype).eps ** 0.5 * scores.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
        best = scores >= scores.amax(1, keepdim=True) - tolerance  # (B, |G|)
        image, g = best.nonzero(as_tuple=True)  # one row for each image, and more where scores tie
        given = _on_batch(self.net, views[g, image])
        _require_one(given, self.vectors)

        def mean(y: Tensor) -> Tensor:
            if self._moves(y):
                y = self._moved(y)[g, torch.arange(g.shape[0], device=y.device)]
            y = y / best.sum(1)[image].view(-1, *(1,) * (y.ndim - 1)).to(y.dtype)
            unsure = ~best.any(1).view(-1, *(1,) * (y.ndim - 1))  # no score is the best of some that are no numbers
            return y.new_zeros(scores.shape[0], *y.shape[1:]).index_add(0, image, y).masked_fill(unsure, math.nan)

        return _map(mean, given)

    def _moved(self, y: Tensor) -> Tensor:
        """g.y for every g: (|G|, B, C, H, W), or (|G|, B, C) without pixels."""
        return torch.stack([self.group.transform_vectors(y, g, self.vectors) for g in range(self.group.order)])


def pose_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over classes and poses for upright images: the target is the class at the identity.

    Equivariance does the rest: the image turned by g has the same loss with the target at g.

    Args:
        logits: (B, classes, |G|).
        labels: (B,), class indices; -100 leaves an image out.

    Raises:
        ValueError: the logits or the labels are of another shape or type.

    Source: Bao & Song 2019, arXiv:1906.07172, section 5.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits are {tuple(logits.shape)}; accepted are those with poses, (B, classes, |G|)")
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:1] or labels.is_floating_point():
        of = f" of {labels.dtype}" if isinstance(labels, Tensor) else ""
        raise ValueError(
            f"labels are {_shape(labels)}{of}; accepted are class indices ({len(logits)},), a tensor of integers"
        )
    labels, (classes, order) = labels.long(), logits.shape[1:]  # uint8 would wrap around
    try:
        return F.cross_entropy(logits.flatten(1), labels.where(labels < 0, labels * order))
    except IndexError as error:
        raise ValueError(
            f"labels are {labels.tolist()}; accepted are classes, 0 to {classes - 1}, and -100, which leaves one out"
        ) from error


def poses(group: Group, x: Tensor) -> Tensor:
    """g^-1 x for every g: (|G|, B, C, H, W).

    Raises:
        ValueError: x is no batch of images, or not square while the group has quarter turns.
    """
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError(f"x is {_shape(x)}; accepted is a batch of images (B, C, H, W)")
    _require_square(group, "images", x)
    return torch.stack([group.transform_image(x, group.inverse(g)) for g in range(group.order)])


def _one_hot(scores: Tensor) -> Tensor:
    """(B, |G|): one at the highest score, with the gradient of the softmax."""
    soft = scores.softmax(1)
    hard = F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)
    return hard + (soft - soft.detach())  # in these brackets the sum stays exactly one-hot


def _chosen(choice: Tensor, values: Tensor) -> Tensor:
    """(|G|, B, C, ...) to (B, C, ...) by a one-hot ``choice`` (B, |G|)."""
    if not choice.requires_grad:  # picked, as zero times a masked logit of -inf is no number
        return values[choice.argmax(1), torch.arange(len(choice), device=values.device)]
    return (choice.T.view(*choice.T.shape, *(1,) * (values.ndim - 2)).to(values.dtype) * values).sum(0)


def _grid_group(group: str | Group) -> Group:
    group = groups.get(group) if isinstance(group, str) else group
    if not isinstance(group, Group):
        raise ValueError(f"group is {group!r}; accepted are names such as 'p4', and a gzoo.groups.Group")
    if not group.on_grid:
        raise ValueError(
            f"{group.name} turns pixels between pixels, so out(x)[g] = net(g^-1 x) would need interpolation and be "
            "exact for none; take a group on the grid: p4, p4m, c1, c2, d1, d2, or convert the network (gzoo.convert)"
        )
    return group


def _shape(x: object) -> str:
    """What was given in place of a tensor of another shape, for messages."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _map(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """``function`` on the tensors of what a network gives, in their tuples and dictionaries; None stays None."""
    return tree_map(lambda *leaves: None if leaves[0] is None else function(*leaves), *outputs)


def _on_batch(layer: nn.Module, x: Tensor) -> Any:
    """``layer(x)``; raises ValueError unless it is tensors of the same batch: one, or several in a nest."""
    y = layer(x)
    for leaf in [leaf for leaf in tree_leaves(y) if leaf is not None] or [y]:
        if not isinstance(leaf, Tensor) or leaf.shape[:1] != x.shape[:1]:
            given = f"{type(layer).__name__} gives {_shape(leaf)}"
            raise ValueError(f"{given} for a batch of {len(x)}; accepted are {_ACCEPTED}")
    return y


def _require_one(output: Any, vectors: Directions) -> None:
    """Raises ValueError for several outputs, of which ``vectors`` would not say whose channels it has."""
    if vectors and not isinstance(output, Tensor):
        raise ValueError(
            f"vectors={vectors!r} are channels of one output, and the network gives a {type(output).__name__}; wrap it "
            "in a module that gives one tensor"
        )


def _require_output(group: Group, y: Tensor) -> None:
    """Raises ValueError unless y is vectors, or maps that the group can turn."""
    if y.ndim not in (2, 4):
        raise ValueError(f"the network's output is {tuple(y.shape)}; accepted are {_ACCEPTED}")
    if y.ndim == 4:
        _require_square(group, "network's maps", y)


def _require_square(group: Group, what: str, x: Tensor) -> None:
    """Raises ValueError unless the pixels of x, (..., H, W), are square or have no quarter turns."""
    height, width = x.shape[-2:]
    if group.rotations == 4 and height != width:
        raise ValueError(
            f"the {what} are {height}x{width} pixels and {group.name} turns by 90 degrees, which exchanges height and "
            "width; pad or crop them to a square, or take c2, d1 or d2"
        )


_ACCEPTED = (
    "vectors (B, D) or maps (B, D, H, W), or several in tuples and dictionaries; wrap it in a module that gives such"
)
