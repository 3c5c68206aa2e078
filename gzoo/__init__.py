"""gzoo: group-equivariant CNNs for timm. Importing it registers the models with timm and does nothing else."""

from gzoo import groups, nn, partial, registry
from gzoo.check import check
from gzoo.convert import convert, rule
from gzoo.fields import field_types, geometric, transform_features
from gzoo.interop import from_escnn, to_escnn

__all__ = [
    "check",
    "convert",
    "field_types",
    "from_escnn",
    "geometric",
    "groups",
    "nn",
    "partial",
    "registry",
    "rule",
    "to_escnn",
    "transform_features",
]
