"""A plain module applied to each element of the fibre by itself."""

from torch import Tensor, nn


class PerElement(nn.Module):
    """Any plain module on regular fields, once for each g: it sees the channels at one g of all fields, as a batch.

    G permutes the elements of all fibres alike, so it permutes what the module is given, and its results. A norm over
    channels keeps |G| statistics this way, each that of the plain network in one pose, where `FibreNorm` has one for
    all. Exact for every group, if ``module`` itself treats all pixels alike.

    Args:
        module: a module on ``fields`` channels that gives as many.
        group_order: |G|.
        dim: where the channels are: 1, or -1 for channels last.

    Shape:
        x and result: (B, fields * |G|, H, W), or (B, H, W, fields * |G|); channel = field * |G| + g.
    """

    def __init__(self, module: nn.Module, group_order: int, dim: int = 1) -> None:
        super().__init__()
        self.module = module
        self.group_order, self.dim = group_order, dim

    def forward(self, x: Tensor) -> Tensor:
        dim, order = self.dim % x.ndim, self.group_order
        elements = x.unflatten(dim, (-1, order)).movedim(dim + 1, 0)  # (|G|, B, fields, H, W)
        y = self.module(elements.flatten(0, 1)).unflatten(0, (order, -1))
        return y.movedim(0, dim + 1).flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        return f"group_order={self.group_order}, dim={self.dim}"
