"""The zoo: every model is a row, backbone + group + recipe, registered with timm as ``{group}_{backbone}``."""

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import PretrainedCfg
from torch import nn

from gzoo import backbones, equivision, foreign, groups, redet, weights
from gzoo.bases import BasisName
from gzoo.continuous import ContinuousCNN13, ContinuousResNet
from gzoo.convert import OPTIONS, convert_in_place
from gzoo.groups import DoubleAngle
from gzoo.nn.linear import Head, Pooling
from gzoo.plan import Fit, Match, plan


@dataclass(frozen=True)
class Backbone:
    """A plain network. ``build(**kwargs)`` gives it; timm's own are built by name.

    Attributes:
        name: timm's name, or ours where ``build`` is given.
        config: what timm's pretrained config says of it: first_conv, classifier, input_size, num_classes, mean ...
        build: constructor of a plain network that timm lacks.
    """

    name: str
    config: Mapping[str, Any]
    build: Callable[..., nn.Module] | None = None

    def plain(self, **kwargs: Any) -> nn.Module:
        """The plain network."""
        return self.build(**kwargs) if self.build else timm.create_model(self.name, **kwargs)


def _own(
    name: str,
    build: Callable[..., nn.Module],
    first_conv: str = "stem.0",
    input_size: tuple[int, int, int] = (3, 32, 32),
    classifier: str = "head.fc",
    num_classes: int = 10,
) -> Backbone:
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    grey = input_size[0] == 1
    config = {
        "first_conv": first_conv,
        "classifier": classifier,
        "input_size": input_size,
        "num_classes": num_classes,
        "mean": (sum(mean) / 3,) if grey else mean,
        "std": (sum(std) / 3,) if grey else std,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    return Backbone(name, config, build)


def _resnet_cifar(name: str, depth: int, base_width: int = 32) -> Backbone:
    return _own(name, functools.partial(backbones.resnet_cifar, depth, base_width=base_width))


_KEPT = ("first_conv", "classifier", "input_size", "num_classes", "mean", "std", "crop_pct", "interpolation")


def _timm(name: str) -> Backbone:
    config = get_pretrained_cfg(name)
    assert config is not None
    return Backbone(name, {key: getattr(config, key) for key in _KEPT})


_OWN = (
    _resnet_cifar("resnet20", 20),
    _resnet_cifar("resnet32", 32),
    _resnet_cifar("resnet44", 44),
    _resnet_cifar("resnet56", 56),
    _resnet_cifar("resnet110", 110),
    _resnet_cifar("resnet26_cifar", 26, base_width=71),
    _own("wrn16_8", functools.partial(backbones.wide_resnet, 16, 8)),
    _own("wrn28_10", functools.partial(backbones.wide_resnet, 28, 10)),
    _own("allcnnc", backbones.allcnnc, first_conv="stages.0.0"),
    _own("cnn6", backbones.cnn6, input_size=(1, 28, 28)),
    _own("cnn7", backbones.cnn7, input_size=(1, 28, 28)),
    _own("cnn13", backbones.cnn13),
    _own("sfcnn", backbones.sfcnn, input_size=(1, 28, 28)),
    _own("unet", backbones.UNet, "encoder.0.0", (3, 256, 256), classifier="head", num_classes=2),
)

_TIMM = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet26d", "resnet50d", "wide_resnet50_2"),
    *("resnext50_32x4d", "seresnet50", "ecaresnet50t", "resnetaa50", "resnetv2_50", "skresnet18", "resnest14d"),
    *("res2net50_26w_4s", "regnetx_002", "regnetx_032", "regnety_004", "regnety_032", "regnetz_b16", "nfnet_l0"),
    *("convnext_atto", "convnext_nano", "convnext_tiny", "convnextv2_atto", "convnextv2_nano", "inception_next_atto"),
    *("mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv4_conv_small"),
    *("efficientnet_b0", "efficientnet_b3", "efficientnet_lite0", "efficientnetv2_rw_t", "tf_efficientnetv2_b0"),
    *("mixnet_s", "mnasnet_100", "ghostnet_100", "rexnet_100", "lcnet_050", "tinynet_e", "fasternet_t0", "starnet_s1"),
    *("repvgg_a0", "repghostnet_100", "mobileone_s0", "repvit_m0_9", "vgg11_bn", "vgg16_bn", "densenet121", "dla34"),
    *("dpn68", "hrnet_w18", "cspresnet50", "cspdarknet53", "darknet53", "ese_vovnet19b_dw", "selecsls42b"),
    *("hgnetv2_b0", "inception_v4", "xception41", "tresnet_m", "poolformer_s12", "edgenext_xx_small"),
    *("efficientvit_b1", "mobilevitv2_100", "swiftformer_xs", "shvit_s1"),
)

_BACKBONES = {backbone.name: backbone for backbone in (*_OWN, *map(_timm, _TIMM))}

GROUPS = ("p4", "p4m", "c8", "d8")

_SIXTEEN = ("c16", "d16", "d16:c16")

# Networks over finer groups, and those that give up symmetry from stage to stage (Weiler & Cesa 2019).
_FURTHER = {
    **dict.fromkeys(_SIXTEEN, ("cnn6", "cnn7", "sfcnn")),
    "d8:d4:d1": ("wrn16_8", "wrn28_10", "resnet20", "resnet44"),
    "d4:c4:c1": ("resnet20", "resnet18"),
}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        group: a group's name, or those of the stages, "d8:d4:d1"; None for the plain network, the baseline of the rest.
        backbone: a key of the backbones above, and the name of the plain twin.
        widths: plain channels -> fields, where a paper's differ from C / sqrt|G|.
        group_pool: how the classifier pools a fibre.
        basis: of the kernels; None for pixel where the group is on the grid, else steerable.
        weights: tags of pretrained weights, the default first.
        paper: where this network was published.
    """

    group: str | None
    backbone: str
    widths: Mapping[int, int] = field(default_factory=dict, hash=False)
    group_pool: Pooling = "mean"
    basis: BasisName | None = None
    weights: tuple[str, ...] = ()
    paper: str = ""

    def __post_init__(self) -> None:
        if self.group is not None and groups.spell(groups.chain(self.group)) != self.group:
            raise ValueError(f"{self.group} is spelled {groups.spell(groups.chain(self.group))} in names")
        if self.backbone not in _BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; known are {', '.join(_BACKBONES)}")

    @property
    def name(self) -> str:
        """timm's name of the model."""
        return f"{self.group.replace(':', '')}_{self.backbone}" if self.group else self.backbone

    def build(
        self,
        head: Head = "invariant",
        partial: bool = False,
        soft: bool = False,
        subgroup: str | None = None,
        match: Match = "params",
        basis: BasisName | None = None,
        vectors: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        """The network with random weights. `gzoo.convert` says what the arguments are, but for one.

        With ``subgroup``, a subgroup of the entry's group, the network over that one with the same number of fields:
        cheaper by the square of the index, and what `gzoo.grow` starts from. ``vectors`` may also be as JSON has them,
        with a mapping for a `gzoo.DoubleAngle`.
        """
        plain = _BACKBONES[self.backbone].plain(**kwargs)
        if self.group is None:
            asked = {
                "head": head,
                "partial": partial,
                "soft": soft,
                "subgroup": subgroup,
                "match": match,
                "basis": basis,
                "vectors": vectors,
            }
            for name, default in _OF_ENTRIES.items():
                if (value := asked[name]) != default:
                    whose = f"those over a group, p4_{self.name}"
                    raise ValueError(f"{self.name} is a plain network; {name}={value!r} is for {whose}")
            return plain
        basis = basis or self.basis
        fitted = _fitted(self, match, basis)
        group, basis = (self.group, basis) if subgroup is None else self._over(subgroup, basis)
        # Without the self-check: the tests check every entry, and it takes longer than the building.
        return convert_in_place(
            plain,
            group,
            match=match,
            widths=self._widths(match),
            group_pool="mean" if partial else self.group_pool,
            basis=basis,
            fitted=fitted,
            head=head,
            partial=partial,
            soft=soft,
            vectors=_directions(vectors),
        )

    def _widths(self, match: Match) -> Mapping[int, int]:
        """Those of the paper, which are what the entry is without a wish for others."""
        return self.widths if match == "params" else {}

    def _over(self, subgroup: str, basis: BasisName | None) -> tuple[str, BasisName | None]:
        """The name of a subgroup, and the basis that the kernels have over the entry's group."""
        assert self.group is not None
        if ":" in self.group:
            raise ValueError(f"{self.name} is not over one group, so it has no subgroup={subgroup!r}")
        group, smaller = groups.get(self.group), groups.get(subgroup)
        group.elements_of(smaller)  # raises
        return smaller.name, basis or (None if group.on_grid else "steerable")


def _directions(vectors: Any) -> Any:
    """Channels that are vectors, where they come from a config.json, in which a `gzoo.DoubleAngle` is a mapping."""
    if not isinstance(vectors, Mapping):
        return vectors  # for gzoo.convert to refuse
    return dict(vectors) | {
        path: [DoubleAngle(**item) if isinstance(item, Mapping) else item for item in channels]
        for path, channels in vectors.items()
        if isinstance(channels, list)
    }


@functools.cache
def _fitted(entry: Entry, match: Match, basis: BasisName | None) -> Fit:
    """The widths that ``match`` leads to for the plain network as it was published. The same for any number of classes
    or channels of the image, or weights would not fit a network with another classifier."""
    assert entry.group is not None
    with torch.device("meta"):
        published: Any = _BACKBONES[entry.backbone].plain()
    published.pretrained_cfg = dict(_BACKBONES[entry.backbone].config)  # at its own size the multiply-adds are counted
    return plan(published, groups.chain(entry.group), match, entry._widths(match), basis=basis).fitted


_COHEN_WELLING = "arXiv:1602.07576"
_RONNEBERGER = "arXiv:1505.04597"
_WEILER_CESA = "arXiv:1911.08251"
_STEERABLE: dict[str, Any] = {"group_pool": "max", "basis": "steerable_3r", "paper": _WEILER_CESA}  # their band limit
_SFCNN_FIELDS = {96: 24, 128: 32, 144: 36, 256: 64, 384: 96}

# What the rows of some networks say beyond group and backbone.
_DETAILS: dict[str, dict[str, Any]] = {
    "unet": {"paper": _RONNEBERGER},
    "wrn16_8": {"paper": "arXiv:1605.07146"},
    "wrn28_10": {"paper": "arXiv:1605.07146"},
    "resnet44": {"weights": ("cifar10",), "paper": _COHEN_WELLING},
    "resnet20": {"weights": ("cifar10", "rotate_cifar10")},
    "p4m_resnet20": {"weights": ("cifar10",)},
    "c8_resnet20": {"weights": ("cifar10",)},
    "p4m_resnet44": {"weights": ("cifar10",), "paper": _COHEN_WELLING},
    "resnet26_cifar": {"paper": _COHEN_WELLING},
    "p4m_resnet26_cifar": {"paper": _COHEN_WELLING},
    "allcnnc": {"paper": "arXiv:1412.6806"},
    "p4_allcnnc": {"paper": _COHEN_WELLING},
    "p4m_allcnnc": {"widths": {96: 32, 192: 64}, "paper": _COHEN_WELLING},
    "cnn6": {"weights": ("rotmnist",), "paper": _WEILER_CESA},
    **{f"{group}_cnn6": {"group_pool": "max", "paper": _WEILER_CESA} for group in ("p4", "p4m")},
    **{f"{group}_cnn6": _STEERABLE for group in ("d8", *_SIXTEEN)},
    **{f"{group}_cnn6": _STEERABLE | {"weights": ("rotmnist",)} for group in ("c8", "c16")},
    "cnn7": {"weights": ("rotmnist", "rotate_rotmnist"), "paper": _COHEN_WELLING},
    "p4_cnn7": {"group_pool": "max", "weights": ("rotmnist", "rotate_rotmnist"), "paper": _COHEN_WELLING},
    "p4m_cnn7": {"group_pool": "max", "weights": ("rotmnist",)},
    "c8_cnn7": {"group_pool": "max", "weights": ("rotmnist",)},
    "d8_cnn7": {"group_pool": "max"},
    "cnn13": {"paper": "arXiv:1610.02242"},
    "sfcnn": {"paper": "arXiv:1711.07289"},
    "c8_sfcnn": _STEERABLE,
    "d16_sfcnn": _STEERABLE,
    **{f"{group}_sfcnn": _STEERABLE | {"widths": _SFCNN_FIELDS} for group in ("c16", "d16:c16")},
}


def _described(group: str | None, backbone: str) -> Entry:
    return Entry(group, backbone, **_DETAILS.get(f"{group}_{backbone}" if group else backbone, {}))


ENTRIES = (
    *(_described(None, backbone.name) for backbone in _OWN),
    *(_described(group, backbone) for group in GROUPS for backbone in _BACKBONES),
    *(_described(chain, backbone) for chain, names in _FURTHER.items() for backbone in names),
)


def _configs(entry: Entry) -> dict[str, dict[str, Any]]:
    """timm's pretrained configs of an entry by ``name.tag``, or under its bare name without weights."""
    base = {
        **_BACKBONES[entry.backbone].config,
        "pool_size": None,
        "license": "apache-2.0",
        "paper_ids": entry.paper or None,
    }
    if not entry.weights:
        return {entry.name: base}
    return {f"{entry.name}.{tag}": base | weights.pretrained_cfg(entry.name, tag) for tag in entry.weights}


# Names of equivision's ResNets and ReDet's, which have their widths where the tag says so. No weights are bundled or on
# the Hub: `gzoo import` makes a folder from a file that the user has.
_EQUIVISION = {row.name: key for key, row in equivision.ARCHITECTURES.items()}
_IMPORTED: dict[str, Callable[..., nn.Module]] = {
    **{f"{name}.{equivision.TAG}": functools.partial(equivision.create, key) for name, key in _EQUIVISION.items()},
    **{f"{redet.name(depth)}.{redet.TAG}": functools.partial(redet.create, depth) for depth in redet.DEPTHS},
}


# Networks over continuous groups, which no recipe makes from a plain one; t2 is the baseline of the other two.
_CONTINUOUS: dict[str, functools.partial[Any]] = {
    "t2_resnet": functools.partial(ContinuousResNet, "t2", elements=1),
    "se2_resnet": functools.partial(ContinuousResNet, "se2"),
    "e2_resnet": functools.partial(ContinuousResNet, "e2"),
    "t2_cnn13": functools.partial(ContinuousCNN13, "t2", elements=1),
    "se2_cnn13": functools.partial(ContinuousCNN13, "se2"),
    "e2_cnn13": functools.partial(ContinuousCNN13, "e2"),
}


def _factory(name: str, entry: Entry | None) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        overlay = {"hf_hub_filename": weights.FILENAME, **(pretrained_cfg_overlay or {})}
        config = _resolve(name, pretrained_cfg, overlay)
        build: Callable[..., nn.Module]
        if name in _CONTINUOUS:
            build = _CONTINUOUS[name]
        elif entry is None:
            build = _IMPORTED[f"{name}.{equivision.TAG}"]
        else:
            build = _IMPORTED.get(f"{name}.{config.tag}", entry.build)
        if entry is None or build != entry.build:
            _refuse_options(f"{name}.{config.tag}" if config.tag else name, kwargs)
        if name in _CONTINUOUS and kwargs.get("features_only"):
            raise ValueError(f"{name} gives no pyramid of features; take forward_features, or p4_resnet18 and its like")
        # The getter takes the stages from forward_intermediates, so a features_only model keeps its group. It alone
        # takes None for all levels.
        levels: dict[str, Any] = {"feature_cls": "getter", "out_indices": None}
        if kwargs.get("features_only") and kwargs.get("feature_cls", "getter") != "getter" and entry is not None:
            with torch.device("meta"):
                plain: Any = _BACKBONES[entry.backbone].plain()
            levels["out_indices"] = tuple(range(len(plain.feature_info)))
        if kwargs.get("features_only") and kwargs.get("global_pool") == "":
            kwargs["num_classes"] = 0  # a classifier would be given a map
        with weights.explained(config) if pretrained else nullcontext():
            if pretrained:
                overlay |= weights.verified(config, kwargs.get("cache_dir"))
            model = build_model_with_cfg(
                build,
                name,
                pretrained,
                pretrained_cfg=pretrained_cfg,
                pretrained_cfg_overlay=overlay,
                pretrained_filter_fn=weights.require_fit,
                feature_cfg=levels,
                **kwargs,
            )
        if isinstance(model, FeatureGetterNet):
            model.register_load_state_dict_pre_hook(_move_keys_inside)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    if name in _CONTINUOUS:
        create.__doc__ = _CONTINUOUS[name].func.__doc__
    elif entry is None:
        create.__doc__ = "A ResNet of https://github.com/dmklee/equivision: see gzoo.equivision."
    else:
        create.__doc__ = f"{entry.backbone} over {entry.group or 'no group: the plain network'}. {entry.paper}".strip()
    return create


def _move_keys_inside(getter: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """So that features take the state of the network with a classifier, as those of plain networks do."""
    inside = f"{prefix}model."
    own = [key for key in state_dict if key.startswith(prefix)]
    if not any(key.startswith(inside) for key in own):
        state_dict |= {inside + key.removeprefix(prefix): state_dict.pop(key) for key in own}


_OF_ENTRIES: dict[str, Any] = {**OPTIONS, "subgroup": None}


def _refuse_options(name: str, kwargs: dict[str, Any]) -> None:
    """Takes the options of `Entry.build` out of ``kwargs``, for networks that it does not make; raises ValueError if
    one asks for something. Networks over continuous groups have a ``partial`` of their own."""
    for option, default in _OF_ENTRIES.items():
        if option != "partial" and (given := kwargs.pop(option, default)) != default:
            raise ValueError(
                f"{name} takes {option}={default!r} alone, not {given!r}: it is no plain network that gzoo converts. "
                f"Leave {option} out, or take one that is, such as p4_resnet18 or c8_cnn7"
            )


def _resolve(name: str, pretrained_cfg: Any, overlay: dict[str, Any]) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    except RuntimeError as error:
        tags = [key.partition(".")[2] for key in _CONFIGS if key.startswith(f"{name}.")]
        raise ValueError(
            f"{name} has no weights with the tag {pretrained_cfg!r}; it has {', '.join(tags) or 'none'}"
        ) from error


_CONFIGS: dict[str, Any] = {name: config for entry in ENTRIES for name, config in _configs(entry).items()}
for _name in _IMPORTED:
    _CONFIGS[_name] = {**_BACKBONES["resnet50"].config, **foreign.PREPROCESSING, "pool_size": None}
for _name in _CONTINUOUS:
    _CONFIGS[_name] = {
        **_BACKBONES["cnn13" if "cnn13" in _name else "cnn7"].config,
        "first_conv": "stem.conv",
        "classifier": "fc",
        "pool_size": None,
        "paper_ids": "arXiv:2110.10211",
    }

default_cfgs = generate_default_cfgs(_CONFIGS)

_BY_NAME: dict[str, Entry | None] = {
    **dict.fromkeys((*_EQUIVISION, *_CONTINUOUS)),
    **{entry.name: entry for entry in ENTRIES},
}
for _name, _entry in _BY_NAME.items():
    setattr(sys.modules[__name__], _name, register_model(_factory(_name, _entry)))
