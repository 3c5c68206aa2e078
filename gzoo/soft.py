"""Soft equivariance: beside each group convolution a plain one, which a penalty holds near zero.

`make_soft` adds these residual paths to a converted network, `penalty` is what a training loop adds to its loss. A
convolution is linear in its filter, so both paths are one convolution with the sum of the filters: it costs no more
multiply-adds than the equivariant one, but stores |G| times the parameters beside its own.

Source: Finzi, Benton & Wilson 2021, "Residual Pathway Priors for Soft Equivariance Constraints", arXiv:2112.01388. The
prior of the equivariant weights is what the optimizer's weight decay makes it; that of the residual ones is `penalty`.
"""

import torch
from torch import Tensor, nn

from gzoo.nn import GroupConv2d, LiftingConv2d
from gzoo.partial import subsets


@torch.no_grad()
def make_soft(model: nn.Module) -> None:
    """Gives each lifting and group convolution of ``model``, in place, a residual filter of zeros.

    The network stays what it is, to the last bit, until the residual filters are trained: so a pretrained network can
    become soft. Norms, linear layers and transposed convolutions stay equivariant.

    Args:
        model: a converted network, with or without trained weights.

    Raises:
        ValueError: the network has no such convolution, or is partial or soft already.
    """
    name = type(model).__name__
    if any(subsets(model)):
        raise ValueError(
            f"{name} is partial: it gives up elements, a soft network gives way in its weights; take one of the two"
        )
    if residuals(model):
        raise ValueError(f"{name} is soft already; its residual filters stay as they are")
    found = _convolutions(model)
    if not found:
        raise ValueError(f"{name} has no lifting or group convolution; convert it with gzoo.convert first")
    for convolution in found:
        zeros = torch.zeros_like(convolution.filter())
        convolution.residual = nn.Parameter(zeros, requires_grad=convolution.weight.requires_grad)


def _convolutions(model: nn.Module) -> list[LiftingConv2d | GroupConv2d]:
    return [module for module in model.modules() if isinstance(module, LiftingConv2d | GroupConv2d)]


def residuals(model: nn.Module) -> list[nn.Parameter]:
    """The residual filters of a soft network, in order; none of another network."""
    return [convolution.residual for convolution in _convolutions(model) if convolution.residual is not None]


def penalty(model: nn.Module) -> Tensor:
    """Half the sum of squares of all residual filters: minus the logarithm of their Gaussian prior of variance one.

    With a prior of variance v and N training images, its weight beside the mean loss of an image is 1 / (v N). A large
    weight keeps the network equivariant, weight 0 leaves it free to become a plain one.

    Args:
        model: a soft network.

    Shape:
        result: a number, with a gradient.

    Raises:
        ValueError: the network is not soft.

    Source: arXiv:2112.01388, section 4.
    """
    found = residuals(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} is not soft, so there is nothing to penalize; create it with soft=True "
            "(gzoo.convert, or timm.create_model for a model over a group)"
        )
    return torch.stack([residual.square().sum() for residual in found]).sum() / 2
