"""Linear maps on fibres: equivariant inside a network, invariant at its end."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gzoo.bases import regular_basis
from gzoo.groups import Directions, DoubleAngle, Group
from gzoo.nn.constant import Constants, on_default_device
from gzoo.nn.conv import require_fields
from gzoo.nn.expand import ExpandedLayer, along_fibre

if TYPE_CHECKING:
    from escnn.nn import FieldType

Pooling = Literal["mean", "max"]
Head = Literal["invariant", "pose"]


class GroupLinear(ExpandedLayer):
    """Equivariant linear map between regular fibres: a group convolution without pixels. Exact for every group.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_fields: number of regular fields out.
        bias: whether each field has one.

    Shape:
        x: (..., in_fields * |G|); result: (..., out_fields * |G|). weight: (out_fields, in_fields, |G|).

    Raises:
        ValueError: x does not have in_fields * |G| channels.

    Source: Cohen & Welling 2016, arXiv:1602.07576, equation 11 at a single pixel.
    """

    def __init__(self, group: Group, in_fields: int, out_fields: int, bias: bool = True) -> None:
        basis = regular_basis(group, 1)._replace(parameters=(group.order,))
        super().__init__(out_fields, in_fields, basis)
        self.group, self.in_fields, self.out_fields = group, in_fields, out_fields
        self.bias = nn.Parameter(torch.zeros(out_fields)) if bias else None
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.fan_in))

    @property
    def fan_in(self) -> int:
        """How many inputs one output sums up."""
        return self.weight[0].numel()

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: ``in_fields`` regular fields."""
        return self.group.field_type(self.in_fields)

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type: ``out_fields`` regular fields."""
        return self.group.field_type(self.out_fields)

    def forward(self, x: Tensor) -> Tensor:
        require_fields(x, -1, self.in_fields, self.group)
        bias = None if self.bias is None else along_fibre(self.bias, self.group.order)
        return F.linear(x, self.filter().flatten(1), bias)

    def extra_repr(self) -> str:
        return f"{self.group.name}, {tuple(self.weight.shape)}, bias={self.bias is not None}"


class PoseLinear(GroupLinear):
    """Classifier of class and pose: logits that move along the group when the image is transformed. Exact.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_features: number of classes.
        bias: whether each class has one.

    Shape:
        x: (B, in_fields * |G|); result: (B, out_features, |G|). weight: (out_features, in_fields, |G|).

    Raises:
        ValueError: x does not have in_fields * |G| channels.

    Source: the labels of Bao & Song 2019, arXiv:1906.07172, section 5, at the end of a G-CNN.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (self.out_fields, self.group.order))


class PoseConv2d(GroupLinear):
    """Classifier of class and pose of each pixel: a 1x1 convolution, whose logits move as regular fields. Exact.

    Arguments, weight, error and source are those of `PoseLinear`.

    Shape:
        x: (B, in_fields * |G|, H, W); result: (B, out_features * |G|, H, W), channel = class * |G| + g.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GroupPool(nn.Module):
    """Group pooling: the mean or the maximum of each fibre, regular to trivial. Exact for every group.

    Args:
        group_order: |G|.
        pool: "mean" or "max".
        dim: where the channels are, 1 or -1.

    Shape:
        x: (B, fields * |G|, ...); result: (B, fields, ...). Or (B, ..., fields * |G|) and (B, ..., fields).

    Source: coset pooling over all of G, Cohen & Welling 2016, arXiv:1602.07576, section 6.3.
    """

    def __init__(self, group_order: int, pool: Pooling = "mean", dim: Literal[1, -1] = 1) -> None:
        super().__init__()
        if pool not in get_args(Pooling):
            raise ValueError(
                f"a fibre is pooled by {pool!r}; accepted are {' and '.join(map(repr, get_args(Pooling)))}"
            )
        self.group_order, self.pool, self.dim = group_order, pool, dim

    def forward(self, x: Tensor) -> Tensor:
        fibres = x.unflatten(self.dim, (-1, self.group_order))  # (B, fields, |G|, ...)
        along = 2 if self.dim == 1 else -1
        return fibres.amax(along) if self.pool == "max" else fibres.mean(along)

    def extra_repr(self) -> str:
        return f"group_order={self.group_order}, pool={self.pool!r}"


_NONE, _DOUBLED = -1, -2  # in a row of channels: nothing more, and turns by twice the angle


def _rows(vectors: Directions) -> Tensor:
    """The channels of each of ``vectors`` as rows of one tensor."""
    rows = [(*places, _DOUBLED) if isinstance(places, DoubleAngle) else tuple(places) for places in vectors]
    return pad_sequence([torch.tensor(row, device="cpu") for row in rows], batch_first=True, padding_value=_NONE)


class VectorPool(Constants, GroupPool):
    """Group pooling to vectors: pairs of regular fields become vectors that turn with the image. Exact for every group.

    With f the two fields of a pair and rho(g) the matrix of g, the vector is the mean over g of rho(g) f(g). For a
    `gzoo.DoubleAngle` rho(g) turns by twice the angle. More than two fields become numbers of as many directions, which
    rho(g) permutes, as the distances to the sides of a box.

    Args:
        group: any point group.
        vectors: the fields of each, as `Group.transform_vectors` has them. Other fields are pooled.
        pool: group pooling of those, "mean" or "max".
        dim: where the channels are, 1 or -1.

    Shape:
        x: (B, fields * |G|, ...); result: (B, fields, ...). Or (B, ..., fields * |G|) and (B, ..., fields).

    Raises:
        ValueError: as `Group.transform_vectors`; a checkpoint is of other vectors.

    Source: regular fields to irreps of frequency 1 and 2, Weiler & Cesa 2019, arXiv:1911.08251, section 2.6; and to
    quotient fields.
    """

    constants: ClassVar[tuple[str, ...]] = ("turns", "channels")

    def __init__(self, group: Group, vectors: Directions, pool: Pooling = "mean", dim: Literal[1, -1] = 1) -> None:
        super().__init__(group.order, pool, dim)
        self.group, self.vectors = group, tuple(vectors)
        self.own = sorted({channel for places in vectors for channel in places})  # the fields that become vectors
        units = torch.eye(self.own[-1] + 1, device="cpu")
        columns = torch.stack([group.transform_vectors(units, g, vectors) for g in range(group.order)])
        turns = columns.mT[:, self.own][..., self.own]  # (|G|, numbers, numbers)
        self.register_buffer("turns", on_default_device(turns), persistent=False)
        # In the state_dict, as other vectors, or none, would make other outputs of the same weights.
        self.register_buffer("channels", on_default_device(_rows(self.vectors)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}channels")
        if found is not None and found.tolist() != _rows(self.vectors).tolist():
            rows = [tuple(channel for channel in row if channel != _NONE) for row in found.tolist()]
            given = [DoubleAngle(*row[:2]) if row[-1] == _DOUBLED else row for row in rows]
            raise ValueError(
                f"this checkpoint is of a network whose vectors at {prefix[:-1]} are channels {given}, but the model "
                f"has {list(self.vectors)}; convert it with the vectors of the checkpoint"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        fibres = x.movedim(self.dim, -1).unflatten(-1, (-1, self.group_order))  # (B, ..., fields, |G|)
        vectors = torch.einsum("...ig,gji->...j", fibres[..., self.own, :], self.turns.to(x.dtype)) / self.group_order
        numbers = fibres.amax(-1) if self.pool == "max" else fibres.mean(-1)
        places = list(range(fibres.shape[-2]))
        for i, channel in enumerate(self.own):
            places[channel] = len(places) + i
        return torch.cat((numbers, vectors), -1)[..., places].movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"{self.group.name}, vectors={self.vectors}, pool={self.pool!r}"


class InvariantLinear(nn.Linear):
    """Classifier: group pooling, then a linear map. Logits do not change when the image is transformed.

    Weight and bias are those of a plain ``nn.Linear`` on ``in_fields`` inputs, so timm can swap or drop them.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_features: number of logits.
        pool: group pooling, "mean" or "max".

    Shape:
        x: (B, ..., in_fields * |G|), channels last as for ``nn.Linear``; result: (B, ..., out_features).
        weight: (out_features, in_fields).

    Raises:
        ValueError: x does not have in_fields * |G| channels in its last dimension.
    """

    def __init__(
        self, group: Group, in_fields: int, out_features: int, bias: bool = True, pool: Pooling = "mean"
    ) -> None:
        super().__init__(in_fields, out_features, bias)
        self.group = group
        self.group_pool = GroupPool(group.order, pool, dim=-1)

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: ``in_features`` regular fields."""
        return self.group.field_type(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.shape[-1] != self.in_features * self.group.order:
            raise ValueError(
                f"the classifier takes pooled features (B, C), not a map of shape {tuple(x.shape)}; give the model a "
                "global_pool such as 'avg', or num_classes=0 with global_pool='' for the map itself"
            )
        require_fields(x, -1, self.in_features, self.group)
        return super().forward(self.group_pool(x))


class InvariantConv2d(nn.Conv2d):
    """Classifier of each pixel: group pooling, then a 1x1 convolution. The map of logits moves with the image.

    Weight and bias are those of a plain 1x1 ``nn.Conv2d`` on ``in_fields`` channels, so timm can swap or drop them.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_channels: number of logits.
        pool: group pooling, "mean" or "max".

    Shape:
        x: (B, in_fields * |G|, H, W); result: (B, out_channels, H, W). weight: (out_channels, in_fields, 1, 1).

    Raises:
        ValueError: x does not have in_fields * |G| channels.
    """

    def __init__(
        self, group: Group, in_fields: int, out_channels: int, bias: bool = True, pool: Pooling = "mean"
    ) -> None:
        super().__init__(in_fields, out_channels, 1, bias=bias)
        self.group = group
        self.group_pool = GroupPool(group.order, pool)

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: ``in_channels`` regular fields."""
        return self.group.field_type(self.in_channels)

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type: ``out_channels`` trivial fields."""
        return self.group.image_type(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        require_fields(x, 1, self.in_channels, self.group)
        return super().forward(self.group_pool(x))
