"""Channels without a fibre beside regular fields: the image again, means over channels, attention maps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Run(NamedTuple):
    """Channels of one kind that follow one another: ``size`` regular fields, or as many channels without a fibre."""

    size: int
    regular: bool


class _Runs(nn.Module):
    def __init__(self, group_order: int, runs: Sequence[Run | tuple[int, bool]]) -> None:
        super().__init__()
        self.group_order, self.runs = group_order, tuple(Run(*run) for run in runs)

    def _split(self, x: Tensor, sizes: list[int]) -> list[tuple[Tensor, bool]]:
        if x.shape[1] != sum(sizes):
            raise ValueError(
                f"x of shape {tuple(x.shape)} has {x.shape[1]} channels, not {sum(sizes)}, those of {self.extra_repr()}"
            )
        return [(part, run.regular) for part, run in zip(x.split(sizes, 1), self.runs, strict=True)]

    def extra_repr(self) -> str:
        fields = (f"{run.size} {'regular' if run.regular else 'trivial'}" for run in self.runs)
        return f"{', '.join(fields)} fields of |G| = {self.group_order}"


class RepeatAlongFibre(_Runs):
    """Trivial fields among regular ones become regular: each is repeated |G| times. Exact for every group.

    Args:
        group_order: |G|.
        runs: what the channels of x are, in order: (fields, whether they are regular), ...

    Shape:
        x: (B, C, H, W), C channels as ``runs`` has them; result: (B, fields * |G|, H, W).

    Raises:
        ValueError: x has another number of channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        order = self.group_order
        parts = self._split(x, [run.size * (order if run.regular else 1) for run in self.runs])
        return torch.cat([part if regular else part.repeat_interleave(order, 1) for part, regular in parts], 1)


class PoolSomeFibres(_Runs):
    """Some of the regular fields become trivial: the mean of the fibre. Exact for every group.

    Args:
        group_order: |G|.
        runs: what the channels of the result are, in order: (fields, whether they are regular), ...

    Shape:
        x: (B, fields * |G|, H, W); result: (B, C, H, W), C channels as ``runs`` has them.

    Raises:
        ValueError: x has another number of channels.
    """

    one_for_all_poses = True  # for `gzoo.grow`

    def forward(self, x: Tensor) -> Tensor:
        order = self.group_order
        parts = self._split(x, [run.size * order for run in self.runs])
        return torch.cat([part if regular else part.unflatten(1, (-1, order)).mean(2) for part, regular in parts], 1)
