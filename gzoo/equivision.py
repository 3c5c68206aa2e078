"""ImageNet ResNets of the equivision repository: its checkpoints, made with escnn, become timm ResNets of gzoo.

Source: https://github.com/dmklee/equivision, `equivision/models.py` and `equivision/e2resnet.py`: torchvision's
ResNet-18, 50 and 101 with regular fields in escnn's default steerable basis, inner batch norm, and a maximum over the
group after the average over all pixels. What it publishes are twelve checkpoints, as files on a web drive; they are
the user's to fetch. The table has its widths. That of d8resnet18 is in no file of the repository: 20 is the one that
gives the 11.9 million parameters that its README names.
"""

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from gzoo import _escnn, foreign, groups
from gzoo.equivariant import SIGNATURE, require_same_shapes
from gzoo.groups import Group
from gzoo.interop import Strides, from_escnn

TAG = "equivision_in1k"


class Architecture(NamedTuple):
    """A row of the table: a group's name, the layers of the ResNet, and the regular fields of its stem."""

    group: str
    depth: int
    fields: int

    @property
    def name(self) -> str:
        """The name of the entry without its tag, with the group as equivision spells it: c4_resnet50."""
        return f"{self.group}_resnet{self.depth}"


ARCHITECTURES = {
    f"{row.group}resnet{row.depth}": row
    for row in (
        Architecture("d1", 18, 55),
        Architecture("c4", 18, 39),
        Architecture("d4", 18, 28),
        Architecture("c8", 18, 28),
        Architecture("d8", 18, 20),
        Architecture("d1", 50, 50),
        Architecture("c4", 50, 35),
        Architecture("d4", 50, 25),
        Architecture("c8", 50, 25),
        Architecture("d1", 101, 50),
        Architecture("c4", 101, 35),
        Architecture("d4", 101, 25),
    )
}

# What an R2Conv and an InnerBatchNorm put into a state_dict beside what they learned; some only in eval mode.
_DERIVED = re.compile(r"(^|\.)(filter|expanded_bias|bias_expansion|(in_|out_)?indices_\S+|_basisexpansion\..+)$")


def create(name: str, strides: Strides = "symmetric", **kwargs: Any) -> nn.Module:
    """timm's ResNet of gzoo's layers in equivision's widths and steerable basis, with random weights.

    Args:
        name: as equivision names it: "d4resnet50"; a key of `ARCHITECTURES`.
        strides: as in `gzoo.foreign.resnet`.
        **kwargs: of timm's ResNet.

    Raises:
        ValueError: there is no such model; the message lists the names.
    """
    row = _row(name)
    group = groups.get(row.group)
    return foreign.resnet(row.depth, group, row.fields, "steerable", "max", row.name, TAG, strides, **kwargs)


def _row(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        given = f"equivision has no checkpoint of {name!r}" if name else "say which network the file is of"
        raise ValueError(f"{given}; it has {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def import_checkpoint(path: str | Path, name: str, out: str | Path, strides: Strides = "symmetric") -> nn.Module:
    """Turns a checkpoint of equivision into a folder with model.safetensors and config.json, as training writes it.

    Args:
        path: the file, of ``torch.save`` or safetensors. No code in it is run.
        name: which model it is of: "d4resnet50"; a key of `ARCHITECTURES`.
        out: the folder.
        strides: as in `create`. The weights are the same.

    Returns:
        The network in eval mode. Its logits equal the original's at every image size with "original" strides, and at
        32 n + 1 pixels with symmetric ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is unknown, or the file is truncated or of another model.
    """
    row, path = _row(name), Path(path)
    state = foreign.read(path, "fetch a checkpoint that equivision's README links to")
    try:
        converted = _converted(row, state)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of equivision's {name}: {error}") from error
    model = create(name, strides).eval()
    signature = {SIGNATURE: model.state_dict()[SIGNATURE]}
    # The layers inside equivision's own code are wrapped once; apart from that both networks name them alike.
    model.load_state_dict({key.replace(".layer.", "."): value for key, value in converted.items()} | signature)
    foreign.write(model, out, strides)
    return model


def _converted(row: Architecture, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of gzoo's layers, by the paths of escnn's network, from that of the network itself."""
    # A copy, because escnn's layers share their sampled basis with the whole process, and that of the file may be of a
    # version of escnn that has the functions in another order. It also tells d4 from c8, whose shapes are the same.
    network = copy.deepcopy(escnn_network(row)).train()
    own = network.state_dict()
    learned = [key for key in own if not _DERIVED.search(key) and not key.endswith("num_batches_tracked")]
    wrong = [f"{key} is missing" for key in learned if key not in state]
    wrong += [f"{key} is not in the model" for key in state if key not in own and not _DERIVED.search(key)]
    if wrong:
        raise ValueError("; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    require_same_shapes(network, state, own)
    network.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return from_escnn(network, "steerable").state_dict()


def escnn_network(row: Architecture) -> nn.Module:
    """The network out of escnn's modules, whose state_dict a checkpoint is; its filters are zero."""
    return _ResNet(groups.get(row.group), row.depth, row.fields)


def _convolution(group: Group, in_fields: int, out_fields: int, size: int, stride: int) -> Any:
    types = group.field_type(in_fields), group.field_type(out_fields)
    return _escnn.load().nn.R2Conv(*types, size, size // 2, stride, bias=False, initialize=False)


class _Block(nn.Module):
    """A basic block or a bottleneck of ``width`` fields: bottlenecks stride in the middle and end with 4 * width."""

    def __init__(self, group: Group, in_fields: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        enn, out_fields = _escnn.load().nn, 4 * width if bottleneck else width
        rows = [(in_fields, width, 3, stride), (width, out_fields, 3, 1)]
        if bottleneck:
            rows = [(in_fields, width, 1, 1), (width, width, 3, stride), (width, out_fields, 1, 1)]
        self.layers = len(rows)
        for i, (fields, wider, size, step) in enumerate(rows, start=1):
            self.add_module(f"conv{i}", _convolution(group, fields, wider, size, step))
            self.add_module(f"bn{i}", enn.InnerBatchNorm(group.field_type(wider)))
            self.add_module(f"relu{i}", enn.ReLU(group.field_type(wider)))
        self.downsample = None
        if stride > 1 or in_fields != out_fields:
            self.downsample = enn.SequentialModule(
                _convolution(group, in_fields, out_fields, 1, stride), enn.InnerBatchNorm(group.field_type(out_fields))
            )

    def forward(self, x: Any) -> Any:
        y = x
        for i in range(1, self.layers + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i == self.layers:
                y = y + (x if self.downsample is None else self.downsample(x))
            y = self.get_submodule(f"relu{i}")(y)
        return y


class _ResNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, 1000)."""

    def __init__(self, group: Group, depth: int, fields: int) -> None:
        super().__init__()
        enn, bottleneck = _escnn.load().nn, depth > 18
        self.in_type, stem = group.image_type(3), group.field_type(fields)
        self.wrap = enn.GeometricTensor
        self.conv1 = enn.R2Conv(self.in_type, stem, 7, 3, 2, bias=False, initialize=False)
        self.bn1, self.relu1, self.maxpool = (
            enn.InnerBatchNorm(stem),
            enn.ReLU(stem),
            enn.PointwiseMaxPool2D(stem, 3, 2, 1),
        )
        in_fields = fields
        for i, count in enumerate(foreign.BLOCKS[depth]):
            blocks = []
            for j in range(count):
                blocks.append(_Block(group, in_fields, fields * 2**i, 2 if i and not j else 1, bottleneck))
                in_fields = fields * 2**i * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = enn.PointwiseAdaptiveAvgPool2D(group.field_type(in_fields), 1)
        self.gpool = enn.GroupPooling(group.field_type(in_fields))
        self.fc = nn.Linear(in_fields, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.maxpool(self.relu1(self.bn1(self.conv1(self.wrap(x, self.in_type)))))
        for i in range(1, 5):
            y = self.get_submodule(f"layer{i}")(y)
        return self.fc(self.gpool(self.avgpool(y)).tensor.flatten(1))
