"""Plain modules made equivariant by sharing their per-channel parameters along the fibre.

Layer norm, layer scale and the like combine channels in a way that any permutation of a fibre commutes with, once
their parameters are constant along it. Such a module keeps its class's forward: it stores one number per field, and
reading the parameter repeats it |G| times.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn

from gzoo.nn.expand import along_fibre
from gzoo.nn.front import Made


def share_along_fibre(module: nn.Module, names: tuple[str, ...], group_order: int, fields: int, dim: int = 0) -> None:
    """Shrinks parameters of ``module``, in place, from one number per channel to one per field.

    Each is set to its mean, which keeps a constant initial value (one, zero, a small layer scale). As an attribute each
    then reads as a new tensor: what changes the numbers in place takes the parameter from ``module.parameters()``.

    Args:
        module: any module whose forward reads the parameters as attributes.
        names: attribute names; None-valued ones are skipped.
        group_order: |G|.
        fields: regular fields; the parameter reads as fields * |G| numbers.
        dim: of the parameters that holds the channels.
    """
    held = tuple(name for name in names if module._parameters.get(name) is not None)
    for name in held:
        plain = module._parameters[name]
        assert plain is not None
        shape = (*plain.shape[:dim], fields, *plain.shape[dim + 1 :])
        module._parameters[name] = nn.Parameter(plain.detach().mean().expand(shape).clone(), plain.requires_grad)
    # mypy: it takes the class for an instance, whose hash differs.
    module.__class__ = _sharing_class(type(module), held, group_order, dim)  # type: ignore[arg-type]


def shared_along_fibre(module: nn.Module) -> bool:
    """Whether `share_along_fibre` was here; else the module is one of the image, or of channels without fibres."""
    return any(isinstance(cls, Made) and cls.__module__ == __name__ for cls in type(module).__mro__)


@cache
def _sharing_class(plain: type[nn.Module], names: tuple[str, ...], group_order: int, dim: int) -> type[nn.Module]:
    def repeated(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            parameter = self._parameters[name]
            assert parameter is not None
            return along_fibre(parameter, group_order, dim)

        def write(self: nn.Module, value: Tensor) -> None:  # as nn.DataParallel fills its copies
            self._parameters[name] = value  # type: ignore[assignment]

        return property(read, write)

    members: dict[str, Any] = {name: repeated(name) for name in names}
    members |= {"__module__": __name__, "made_by": (_sharing_class, (plain, names, group_order, dim))}
    made: Any = Made(f"Fibre{plain.__name__}", (plain,), members)
    return made
