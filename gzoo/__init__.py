"""gzoo: group-equivariant CNNs for timm. Importing it registers the models with timm and does nothing else."""

from gzoo import groups, nn, partial, registry, soft
from gzoo.check import check
from gzoo.convert import convert, rule
from gzoo.equivarify import canonicalize, equivarify, pose_loss
from gzoo.fields import field_types, geometric, transform_features
from gzoo.groups import DoubleAngle
from gzoo.interop import from_escnn, to_escnn
from gzoo.reparameterize import reparameterize
from gzoo.transfer import grow

__all__ = [
    "DoubleAngle",
    "canonicalize",
    "check",
    "convert",
    "equivarify",
    "field_types",
    "from_escnn",
    "geometric",
    "groups",
    "grow",
    "nn",
    "partial",
    "pose_loss",
    "registry",
    "reparameterize",
    "rule",
    "soft",
    "to_escnn",
    "transform_features",
]
