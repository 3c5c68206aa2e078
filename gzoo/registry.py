"""The zoo: every model is a row, backbone + group + recipe, registered with timm as ``{group}_{backbone}``."""

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import nn

from gzoo import backbones, groups, weights
from gzoo.convert import convert_in_place
from gzoo.nn.linear import Pooling


@dataclass(frozen=True)
class Backbone:
    """A plain network. ``build(**kwargs)`` gives it; timm's own are built by name.

    Attributes:
        name: timm's name, or ours where ``build`` is given.
        first_conv: path of the convolution that reads the image, for timm's ``in_chans`` adaptation.
        classifier: path of the classifier, for timm's ``num_classes`` adaptation.
        input_size: channels, height and width it was made for.
        num_classes: of the data it was made for.
        build: constructor of a plain network that timm lacks.
    """

    name: str
    first_conv: str
    classifier: str
    input_size: tuple[int, int, int]
    num_classes: int
    build: Callable[..., nn.Module] | None = None

    def plain(self, **kwargs: Any) -> nn.Module:
        """The plain network."""
        return self.build(**kwargs) if self.build else timm.create_model(self.name, **kwargs)


def _cifar(name: str, build: Callable[..., nn.Module], stem: str = "stem.0") -> Backbone:
    return Backbone(name, stem, "head.fc", (3, 32, 32), 10, build)


def _resnet_cifar(name: str, depth: int, base_width: int = 32) -> Backbone:
    return _cifar(name, functools.partial(backbones.resnet_cifar, depth, base_width=base_width))


_BACKBONES = {
    backbone.name: backbone
    for backbone in (
        _resnet_cifar("resnet20", 20),
        _resnet_cifar("resnet32", 32),
        _resnet_cifar("resnet44", 44),
        _resnet_cifar("resnet56", 56),
        _resnet_cifar("resnet110", 110),
        _resnet_cifar("resnet26_cifar", 26, base_width=71),
        _cifar("allcnnc", backbones.allcnnc, stem="stages.0.0"),
        Backbone("cnn7", "stem.0", "head.fc", (1, 28, 28), 10, backbones.cnn7),
        Backbone("resnet18", "conv1", "fc", (3, 224, 224), 1000),
        Backbone("resnet50", "conv1", "fc", (3, 224, 224), 1000),
        Backbone("convnext_atto", "stem.0", "head.fc", (3, 224, 224), 1000),
        Backbone("unet", "encoder.0.0", "head", (3, 256, 256), 2, backbones.UNet),
    )
}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        group: a group's name; None for the plain network, the baseline of the others.
        backbone: a key of the backbones above.
        widths: plain channels -> fields, where a paper's differ from C / sqrt|G|.
        group_pool: how the classifier pools a fibre.
        weights: tags of pretrained weights, the default first.
        paper: where this network was published.
    """

    group: str | None
    backbone: str
    widths: Mapping[int, int] = field(default_factory=dict)
    group_pool: Pooling = "mean"
    weights: tuple[str, ...] = ()
    paper: str = ""

    def __post_init__(self) -> None:
        if self.group is not None and groups.get(self.group).name != self.group:
            raise ValueError(f"{self.group} is spelled {groups.get(self.group).name} in names")
        if self.backbone not in _BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; known are {', '.join(_BACKBONES)}")

    @property
    def name(self) -> str:
        """timm's name of the model."""
        return f"{self.group}_{self.backbone}" if self.group else self.backbone

    def build(self, **kwargs: Any) -> nn.Module:
        """The network with random weights."""
        plain = _BACKBONES[self.backbone].plain(**kwargs)
        if self.group is None:
            return plain
        # Without the self-check: the tests check every entry, and it takes longer than the building.
        return convert_in_place(plain, self.group, widths=self.widths, group_pool=self.group_pool)


_COHEN_WELLING = "arXiv:1602.07576"
_RONNEBERGER = "arXiv:1505.04597"

ENTRIES = (
    Entry(None, "resnet20"),
    Entry(None, "resnet32"),
    Entry(None, "resnet44", paper=_COHEN_WELLING),
    Entry(None, "resnet56"),
    Entry(None, "resnet110"),
    Entry(None, "resnet26_cifar", paper=_COHEN_WELLING),
    Entry(None, "allcnnc", paper="arXiv:1412.6806"),
    Entry(None, "cnn7", weights=("rotmnist",), paper=_COHEN_WELLING),
    Entry(None, "unet", paper=_RONNEBERGER),
    Entry("p4", "resnet20"),
    Entry("p4", "resnet32"),
    Entry("p4", "resnet44"),
    Entry("p4", "resnet56"),
    Entry("p4", "resnet110"),
    Entry("p4", "resnet26_cifar"),
    Entry("p4", "allcnnc", paper=_COHEN_WELLING),
    Entry("p4", "cnn7", group_pool="max", weights=("rotmnist",), paper=_COHEN_WELLING),
    Entry("p4", "resnet18"),
    Entry("p4", "resnet50"),
    Entry("p4", "convnext_atto"),
    Entry("p4", "unet"),
    Entry("p4m", "resnet20"),
    Entry("p4m", "resnet32"),
    Entry("p4m", "resnet44", paper=_COHEN_WELLING),
    Entry("p4m", "resnet56"),
    Entry("p4m", "resnet110"),
    Entry("p4m", "resnet26_cifar", paper=_COHEN_WELLING),
    Entry("p4m", "allcnnc", widths={96: 32, 192: 64}, paper=_COHEN_WELLING),
    Entry("p4m", "cnn7", group_pool="max", weights=("rotmnist",)),
    Entry("p4m", "resnet18"),
    Entry("p4m", "resnet50"),
    Entry("p4m", "convnext_atto"),
    Entry("p4m", "unet"),
    Entry("c8", "resnet20"),
    Entry("c8", "resnet44"),
    Entry("c8", "cnn7", group_pool="max"),
    Entry("c8", "resnet18"),
    Entry("c8", "resnet50"),
    Entry("c8", "convnext_atto"),
    Entry("c8", "unet"),
    Entry("d8", "resnet20"),
    Entry("d8", "resnet44"),
    Entry("d8", "cnn7", group_pool="max"),
    Entry("d8", "resnet18"),
    Entry("d8", "resnet50"),
    Entry("d8", "convnext_atto"),
)


def _configs(entry: Entry) -> dict[str, dict[str, Any]]:
    """timm's pretrained configs of an entry by ``name.tag``, or under its bare name without weights."""
    backbone = _BACKBONES[entry.backbone]
    statistics: dict[str, tuple[float, ...]] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if backbone.input_size[0] == 1:
        statistics = {key: (sum(value) / 3,) for key, value in statistics.items()}
    base = statistics | {
        "first_conv": backbone.first_conv,
        "classifier": backbone.classifier,
        "input_size": backbone.input_size,
        "num_classes": backbone.num_classes,
        "pool_size": None,
        "crop_pct": 0.875 if backbone.build is None else 1.0,
        "interpolation": "bicubic",
        "license": "apache-2.0",
        "paper_ids": entry.paper or None,
    }
    if not entry.weights:
        return {entry.name: base}
    return {f"{entry.name}.{tag}": base | weights.pretrained_cfg(entry.name, tag) for tag in entry.weights}


def _factory(entry: Entry) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        overlay = {"hf_hub_filename": weights.FILENAME, **(pretrained_cfg_overlay or {})}
        config = _resolve(entry, pretrained_cfg, overlay)
        with weights.explained(config) if pretrained else nullcontext():
            return build_model_with_cfg(
                entry.build,
                entry.name,
                pretrained,
                pretrained_cfg=pretrained_cfg,
                pretrained_cfg_overlay=overlay,
                pretrained_filter_fn=weights.require_fit,
                # The getter takes the stages from forward_intermediates, so a features_only model keeps its group.
                feature_cfg={"feature_cls": "getter", "out_indices": None},
                **kwargs,
            )

    create.__name__ = create.__qualname__ = entry.name
    create.__module__ = __name__
    create.__doc__ = f"{entry.backbone} over {entry.group or 'no group: the plain network'}. {entry.paper}".strip()
    return create


def _resolve(entry: Entry, pretrained_cfg: Any, overlay: dict[str, Any]) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(entry.name, pretrained_cfg, overlay)
    except RuntimeError as error:
        raise ValueError(
            f"{entry.name} has no weights with the tag {pretrained_cfg!r}; it has {', '.join(entry.weights) or 'none'}"
        ) from error


default_cfgs = generate_default_cfgs({name: cfg for entry in ENTRIES for name, cfg in _configs(entry).items()})

for _entry in ENTRIES:
    setattr(sys.modules[__name__], _entry.name, register_model(_factory(_entry)))
