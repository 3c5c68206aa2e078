"""What stands in the place of a module that never runs."""

from typing import Any

from torch import nn


class Idle(nn.Module):
    """In the place of a module that ran on no image, neither in evaluation nor in training, which makes running it an
    error.

    Args:
        path: of the module.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{self.path} ran on no image when the network was converted, so it was left out. If an image of another "
            "size would have it run, name that size before: model.pretrained_cfg = {'input_size': (3, height, width)}"
        )
