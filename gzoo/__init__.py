"""gzoo: group-equivariant CNNs for timm. Importing it registers the models with timm and does nothing else."""

from gzoo import groups, nn, registry
from gzoo.check import check
from gzoo.convert import convert, rule
from gzoo.fields import field_types, geometric, transform_features

__all__ = ["check", "convert", "field_types", "geometric", "groups", "nn", "registry", "rule", "transform_features"]
