"""Weight standardization of group convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn


class WeightStandardization(nn.Module):
    """Weight standardization (Qiao et al. 2019, arXiv:1903.10520) of the filters of a group convolution.

    Mean and variance are taken over a field's filters in all poses, which are the same for each pose of the pixel
    basis: the plain layer's, for one pose. Exact as the convolution is.

    Args:
        out_fields: number of regular fields out.
        group_order: |G|.
        eps: added to the variance.
        gain: a learned factor for each channel, as normalizer-free networks have it (arXiv:2102.06171); None for none.
        scale: a factor of the gain.

    Shape:
        filters and result: (out_fields * |G|, channels in, k, k).
    """

    def __init__(
        self, out_fields: int, group_order: int, eps: float, gain: Tensor | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.group_order, self.eps, self.scale = group_order, eps, scale
        self.gain = None if gain is None else nn.Parameter(gain.detach().mean().expand(out_fields).clone())

    def forward(self, filters: Tensor) -> Tensor:
        fields = filters.shape[0] // self.group_order
        gain = None if self.gain is None else self.gain * self.scale
        rows = F.batch_norm(filters.reshape(1, fields, -1), None, None, gain, training=True, eps=self.eps)
        return rows.view_as(filters)
