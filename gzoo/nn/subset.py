"""The elements of the group that a layer keeps: learned, one probability for each."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzoo import groups
from gzoo.groups import Group

# Where training starts, a probability of 0.88: kept in eval mode, dropped often enough to be tried without.
FIRST_LOGIT = 2.0


def draw(logits: Tensor) -> Tensor:
    """Zeros and ones, by the probabilities of their logits: relaxed Bernoulli variables, rounded, with the gradient of
    the relaxed ones (straight through)."""
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    relaxed = (logits + uniform.logit()).sigmoid()
    return (relaxed > 0.5).to(relaxed.dtype) + relaxed - relaxed.detach()


class Subset(nn.Module):
    """A learned subset S of the group: of each fibre the values at S are kept, the others become zero.

    The group sums that follow, of a convolution (v over S in the sum of psi(v^-1 u) f(v)) or of a group pooling by the
    mean, then run over S; the values at S are multiplied by |G| / |S|, so that those sums do not shrink with S. At
    S = G the layer changes nothing, to the last bit.

    In train mode each element but the identity is kept with its own probability, drawn anew at every call: a relaxed
    Bernoulli variable, rounded, with the gradient of the relaxed one (straight through). Only what was kept has a
    gradient, so dropped values are never computed. The draws come from torch's global generator.

    In eval mode S is what is kept with probability one half or more: the likeliest of all subsets, and one set, so that
    the symmetry that is left can be named and holds exactly. The expectation would weigh the elements instead, and
    weights that differ are equivariant to nothing. g.x has its values at gS, so the layer commutes with each g for
    which gS = S (`symmetry`): with all of H if S is a subgroup H. The identity is always kept: S is never empty.

    Args:
        group: any point group but c1.

    Shape:
        x and result: (B, fields * |G|, H, W), or (B, fields * |G|); channel = field * |G| + g.
        logits: (|G| - 1,), of the probabilities of the elements after the identity.

    Raises:
        ValueError: the group has no element beside the identity; x has no whole number of fields.

    Source: Romero & Lohit 2022, arXiv:2110.10211, section 4, distributions over discrete groups.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        if group.order == 1:
            raise ValueError(
                "c1 has no element beside the identity, so there is nothing to drop; choose a larger group"
            )
        self.group = group
        self.logits = nn.Parameter(torch.full((group.order - 1,), FIRST_LOGIT))

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """The values at S, and zeros.

        ``norm``, over fields, sees the kept elements only, as rows of pixels like those of `FibreNorm`.
        """
        order = self.group.order
        if x.shape[1] % order:
            raise ValueError(f"x has {x.shape[1]} channels, no whole number of fields of |G| = {order}; lift it first")
        weights = self._draw() if self.training else self._likeliest()
        kept = weights.nonzero().flatten()
        fibres = x.unflatten(1, (-1, order))  # (B, fields, |G|, H, W)
        values = fibres.index_select(2, kept)  # (B, fields, |S|, H, W)
        if norm is not None:
            rows = values.flatten(2, 3) if values.ndim > 3 else values
            values = norm(rows).view_as(values)
        scale = weights[kept] * (order / weights[kept].sum())
        values = values * scale.to(values.dtype).view(-1, *(1,) * (values.ndim - 3))
        zeros = torch.zeros_like(fibres, dtype=values.dtype)  # in the memory format of x
        return zeros.index_copy(2, kept, values).flatten(1, 2)

    def _draw(self) -> Tensor:
        """(|G|,) of zeros and ones, with the gradient of the relaxed variables."""
        return F.pad(draw(self.logits), (1, 0), value=1.0)

    @torch.no_grad()
    def _likeliest(self) -> Tensor:
        return F.pad((self.logits >= 0).to(self.logits.dtype), (1, 0), value=1.0)

    @property
    def kept(self) -> tuple[int, ...]:
        """The elements of S in eval mode."""
        return tuple(self._likeliest().nonzero().flatten().tolist())

    @property
    def symmetry(self) -> tuple[int, ...]:
        """The subgroup of all g with gS = S: what the layer is equivariant to, exactly, in eval mode."""
        kept = set(self.kept)
        return tuple(
            g for g in range(self.group.order) if {self.group.multiply(g, element) for element in kept} == kept
        )

    def probability(self, g: int) -> float:
        """How likely element g is kept in train mode.

        Raises:
            ValueError: g is no element of the group.
        """
        self.group.require_element(g)
        return self.logits[g - 1].sigmoid().item() if g else 1.0

    @torch.no_grad()
    def keep(self, elements: Iterable[int] | str) -> None:
        """Chooses S by hand: these elements are as likely as all are at the start, the others as unlikely.

        Args:
            elements: of the group, or the name of a subgroup.

        Raises:
            ValueError: one is no element of the group, or it is no subgroup; the identity, 0, is not among them.
        """
        chosen = set(self.group.elements_of(groups.get(elements)) if isinstance(elements, str) else elements)
        for g in chosen:
            self.group.require_element(g)
        if 0 not in chosen:
            raise ValueError(f"{sorted(chosen)} is without the identity, 0, which every layer keeps; add it")
        for g in range(1, self.group.order):
            self.logits[g - 1] = FIRST_LOGIT if g in chosen else -FIRST_LOGIT

    def follow(self, layer: nn.Module, channels_last: bool = False) -> None:
        """Has ``layer``, where it is called and not its ``forward``, keep S from now on; stands there as ``subset``."""
        layer.subset = self
        layer.register_forward_hook(_keep_last if channels_last else _keep)

    def extra_repr(self) -> str:
        return f"{self.group.name}, kept: {', '.join(map(self.group.label, self.kept))}"


# Functions of this module, so that a layer can be copied and pickled with its hook.


def _keep(layer: Any, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    return y if getattr(layer, "subset", None) is None else layer.subset(y)


def _keep_last(layer: Any, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    return _keep(layer, inputs, y.movedim(-1, 1)).movedim(1, -1)
