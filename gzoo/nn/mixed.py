"""Channels without a fibre beside regular fields: the image again, means over channels, attention maps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Run(NamedTuple):
    """Channels of one kind that follow one another: ``size`` regular fields, or as many channels without a fibre."""

    size: int
    regular: bool

    def channels(self, group_order: int) -> int:
        """How many there are."""
        return self.size * (group_order if self.regular else 1)


class RepeatAlongFibre(nn.Module):
    """Trivial fields among regular ones become regular: each is repeated |G| times. Exact for every group.

    Args:
        group_order: |G|.
        runs: what the channels are, in order.

    Shape:
        x: (B, C, H, W), C channels as ``runs`` has them; result: (B, fields * |G|, H, W).
    """

    def __init__(self, group_order: int, runs: Sequence[Run]) -> None:
        super().__init__()
        self.group_order, self.runs = group_order, tuple(runs)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([run.channels(self.group_order) for run in self.runs], 1)
        return torch.cat(
            [
                part if run.regular else part.repeat_interleave(self.group_order, 1)
                for part, run in zip(parts, self.runs, strict=True)
            ],
            1,
        )


class PoolSomeFibres(nn.Module):
    """Regular fields, some of which become trivial: the mean of the fibre. Exact for every group.

    Args:
        group_order: |G|.
        runs: what the result's channels are, in order.

    Shape:
        x: (B, fields * |G|, H, W); result: (B, C, H, W), C channels as ``runs`` has them.
    """

    def __init__(self, group_order: int, runs: Sequence[Run]) -> None:
        super().__init__()
        self.group_order, self.runs = group_order, tuple(runs)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([run.size * self.group_order for run in self.runs], 1)
        return torch.cat(
            [
                part if run.regular else part.unflatten(1, (-1, self.group_order)).mean(2)
                for part, run in zip(parts, self.runs, strict=True)
            ],
            1,
        )
