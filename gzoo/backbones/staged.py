"""A plain CNN of stages with timm's interface; the other files of this folder say which stages.

timm has the interface (`forward_features`, `forward_intermediates`, `reset_classifier` ...) inside each of its
families. The small networks of the papers are all of one form, a stem and a row of stages under a pooled linear head,
so one class with their tables serves them all.
"""

from typing import Any, NamedTuple

from timm.layers.classifier import ClassifierHead
from timm.layers.helpers import get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from gzoo.equivariant import forget_label_names


class Stage(NamedTuple):
    """Blocks that end at one width and resolution: ``reduction`` input pixels become one."""

    blocks: nn.Sequential
    channels: int
    reduction: int


class StagedCNN(nn.Module):
    """Stem, stages, classifier head.

    Args:
        stem: image to the first stage's input.
        stages: in order; each is one level of `feature_info`.
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.

    Shape:
        x: (B, in_chans, H, W); result: (B, num_classes).
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[Stage],
        in_chans: int,
        num_classes: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.Sequential(*(stage.blocks for stage in stages))
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": stage.channels, "reduction": stage.reduction, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]
        self.num_features = stages[-1].channels
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.head_hidden_size = self.head.num_features
        module: Any
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "zero_init_last"):  # timm's residual blocks start as the identity
                module.zero_init_last()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions for timm's layer-wise parameter groups."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: stages recompute their activations in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final linear layer, or the identity that stands in for it."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the final layer; see timm."""
        forget_label_names(self)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps after the stages ``indices`` (all if None), and the last one; see timm."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; a CNN has 'NCHW' only")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages and the head that ``indices`` do not need; see timm."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last feature map (B, num_features, H', W')."""
        x = self.stem(x)
        return checkpoint_seq(self.stages, x) if self.grad_checkpointing else self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map to logits, or to what the classifier would see."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
