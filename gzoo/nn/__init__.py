"""Equivariant layers. Plain tensors in and out; channel = field * |G| + g, as escnn lays a FieldType out."""

from gzoo.nn.conv import GroupConv2d, LiftingConv2d
from gzoo.nn.linear import GroupLinear, GroupPool, InvariantLinear
from gzoo.nn.norm import FibreNorm
from gzoo.nn.resample import SymmetricBlur2d, SymmetricPool2d, keep_original_strides

__all__ = [
    "FibreNorm",
    "GroupConv2d",
    "GroupLinear",
    "GroupPool",
    "InvariantLinear",
    "LiftingConv2d",
    "SymmetricBlur2d",
    "SymmetricPool2d",
    "keep_original_strides",
]
