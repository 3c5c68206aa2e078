"""Restriction: fields of a group, read as fields of a subgroup."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gzoo.groups import Group
from gzoo.nn.constant import Constants, beside, on_default_device
from gzoo.nn.front import Front, put_in_front


class Restriction(Constants):
    """Reads a regular field of G as [G:H] regular fields of its subgroup H; layers behind it need commute with H only.

    Nothing is lost or mixed: each right coset Hx of the fibre becomes a field of its own. Exact for every group.

    Args:
        group: G.
        subgroup: H.

    Shape:
        x: (B, fields * |G|, H, W), or (B, fields * |G|); result: as x, now fields * [G:H] fields of |H| channels. Or a
        list or tuple of these, as some stages give it.

    Raises:
        ValueError: H is no subgroup of G.

    Source: Weiler & Cesa 2019, arXiv:1911.08251, section 2.7; the tests compare with ``escnn.nn.RestrictionModule``.
    """

    constants: ClassVar[tuple[str, ...]] = ("order",)

    def __init__(self, group: Group, subgroup: Group) -> None:
        super().__init__()
        self.before, self.after = group, subgroup
        self.order: Tensor
        order = torch.tensor(group.restriction(subgroup), device="cpu")
        self.register_buffer("order", on_default_device(order), persistent=False)

    def forward(self, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(self._restrict, x))
        return self._restrict(x)

    def _restrict(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, len(self.order))).index_select(2, self.order.to(x.device)).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.before.name} to {self.after.name}"


class RestrictedOutput(Restriction, Front):
    """What `restrict_output` puts in front of the class of a module: a restriction of the module's result."""

    gzoo_prefix = "Restricted"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(super(Restriction, self).forward(*args, **kwargs))  # the inner one is of the plain class


def restrict_output(module: nn.Module, group: Group, subgroup: Group) -> None:
    """Has ``module``, in place, restrict its result.

    A ``nn.Sequential`` gets one more child. Any other module gets a class in front of its own, and no child, as many
    run all that they have. The keys of the state_dict stay.
    """
    restriction = Restriction(group, subgroup)
    restriction.order = beside(next(module.parameters(), restriction.order), restriction.order)
    if isinstance(module, nn.Sequential):
        module.append(restriction)
        return
    module.before, module.after = group, subgroup  # type: ignore[assignment]  # mypy: an nn.Module has modules
    module.register_buffer("order", restriction.order, persistent=False)
    put_in_front(module, RestrictedOutput)
