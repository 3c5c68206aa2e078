"""Buffers that follow from the group: they stay what they are where a network has no numbers yet."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A module with buffers that hold real numbers even on the meta device, and that ``to_empty`` moves, not empties.

    So a network can be made on the meta device and filled from a checkpoint, which need not hold them.

    Attributes:
        constants: the names of these buffers; one that is a parameter here is left alone.
        precise: those of them that stay in float32 where the module goes to half precision, or digits would be lost
            for good.
    """

    constants: ClassVar[tuple[str, ...]]
    precise: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self.constants if name in self._buffers}
        super()._apply(fn, recurse)
        for name, numbers in before.items():
            now = self._buffers[name]
            if numbers is not None and now is not None:
                least = torch.float32 if name in self.precise and now.dtype.itemsize < 4 else now.dtype
                self._buffers[name] = numbers.to(least) if now.is_meta else numbers.to(now.device, least)
        return self


def on_default_device(numbers: Tensor) -> Tensor:
    """As `Constants` are made: where other buffers are, but real numbers where those would be none."""
    return beside(torch.empty(0), numbers)


def beside(tensor: Tensor, numbers: Tensor) -> Tensor:
    """``numbers`` on the device of ``tensor``, but real ones where those would be none."""
    return numbers if tensor.is_meta else numbers.to(tensor.device)
