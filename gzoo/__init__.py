"""gzoo: group-equivariant CNNs for timm. Importing it registers the models with timm and does nothing else."""

from gzoo import groups, nn, registry
from gzoo.check import check
from gzoo.convert import convert, rule

__all__ = ["check", "convert", "groups", "nn", "registry", "rule"]
