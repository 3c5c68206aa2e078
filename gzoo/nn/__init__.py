"""Equivariant layers. Plain tensors in and out; channel = field * |G| + g, as escnn lays a FieldType out."""

from timm.models import register_notrace_module

from gzoo.nn.condconv import GroupCondConv2d
from gzoo.nn.continuous import Arc
from gzoo.nn.conv import GroupConv2d, GroupMapLinear, LiftingConv2d
from gzoo.nn.eca import GroupEca
from gzoo.nn.element import PerElement
from gzoo.nn.linear import (
    GroupLinear,
    GroupPool,
    InvariantConv2d,
    InvariantLinear,
    PoseConv2d,
    PoseLinear,
    VectorPool,
)
from gzoo.nn.mixed import PoolSomeFibres, RepeatAlongFibre
from gzoo.nn.norm import FibreNorm, GroupMapNorm
from gzoo.nn.position import FourierPosition
from gzoo.nn.quotient import QuotientConv2d, QuotientNorm, QuotientPool
from gzoo.nn.resample import SymmetricBlur2d, SymmetricPool2d, SymmetricUnpool2d, keep_original_strides
from gzoo.nn.restrict import Restriction, restrict_output
from gzoo.nn.shuffle import GroupPixelShuffle, GroupPixelUnshuffle
from gzoo.nn.standardize import WeightStandardization
from gzoo.nn.subset import Subset
from gzoo.nn.transposed import GroupConvTranspose2d, GroupVectorMap

__all__ = [
    "Arc",
    "FibreNorm",
    "FourierPosition",
    "GroupCondConv2d",
    "GroupConv2d",
    "GroupConvTranspose2d",
    "GroupEca",
    "GroupLinear",
    "GroupMapLinear",
    "GroupMapNorm",
    "GroupPixelShuffle",
    "GroupPixelUnshuffle",
    "GroupPool",
    "GroupVectorMap",
    "InvariantConv2d",
    "InvariantLinear",
    "LiftingConv2d",
    "PerElement",
    "PoolSomeFibres",
    "PoseConv2d",
    "PoseLinear",
    "QuotientConv2d",
    "QuotientNorm",
    "QuotientPool",
    "RepeatAlongFibre",
    "Restriction",
    "Subset",
    "SymmetricBlur2d",
    "SymmetricPool2d",
    "SymmetricUnpool2d",
    "VectorPool",
    "WeightStandardization",
    "keep_original_strides",
    "restrict_output",
]

for _name in __all__:  # a layer checks shapes, which torch.fx cannot trace: timm's feature extractors keep it whole
    if isinstance(globals()[_name], type):
        register_notrace_module(globals()[_name])
