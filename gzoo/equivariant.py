"""What a converted network adds to its plain class: a head that stays invariant, a state_dict that knows its group.

The plain network keeps its class, and with it its forward and timm's calls; `make_equivariant` puts one of the classes
here in front of it.
"""

import copy
import enum
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from itertools import chain as flatten
from typing import Any, ClassVar, get_args

import torch
from timm.layers import NormMlpClassifierHead
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gzoo import groups
from gzoo.bases import NAMES
from gzoo.groups import DoubleAngle, Group
from gzoo.nn import FibreNorm, GroupPool, InvariantConv2d, InvariantLinear, PoseConv2d, PoseLinear
from gzoo.nn.constant import Constants, beside
from gzoo.nn.continuous import ContinuousGroup
from gzoo.nn.expand import ExpandedLayer
from gzoo.nn.front import Front, put_in_front
from gzoo.nn.linear import Pooling

SIGNATURE = "group_signature"
CONTINUOUS = get_args(ContinuousGroup)  # the signature of a network over one of these is its place here alone
_POOLS = ("", *get_args(Pooling))  # a signature of an older gzoo names no group pooling; it fits either
_ADVICE = "Create the model that the checkpoint was saved from, or give a checkpoint of this one"
_POOL_STEP = 16  # a signature holds basis and pooling in one number: how many bases there can be


def make_equivariant(model: nn.Module, chain: tuple[Group, ...], pool: Pooling, gives_fibres: bool = False) -> None:
    """Gives ``model``, in place, the class that its plain class and `Equivariant` make.

    Args:
        model: a network whose layers are converted already.
        chain: the groups of its stages, mostly one; the last is that of the network.
        pool: how its head pools a fibre.
        gives_fibres: whether it has no head, and its output is a vector of regular fields.
    """
    is_timms = all(hasattr(model, name) for name in ("forward_head", "get_classifier", "reset_classifier"))
    put_in_front(model, EquivariantClassifier if is_timms else EquivariantFeatures if gives_fibres else Equivariant)
    assert isinstance(model, Equivariant)
    model.group, model.chain = chain[-1], chain
    object.__setattr__(model, "group_pool", GroupPool(model.group.order, pool))  # no child: an nn.Sequential runs those
    for head in classifiers(model) if is_timms else ():
        head.knows_fibres = True  # type: ignore[assignment]  # unlike one that a user puts in its place
    sign(model)


def require_network(name: str, given: object) -> None:
    """Raises ValueError unless the argument called ``name`` is a network."""
    if not isinstance(given, nn.Module):
        raise ValueError(f"{name} is {given!r:.60}; it takes a network, an nn.Module as timm.create_model gives it")


def group_of(model: nn.Module) -> Group | None:
    """The group of the first equivariant layer in ``model``; None if there is none."""
    for module in model.modules():
        group = getattr(module, "group", None)
        if isinstance(group, Group):
            return group
    return None


def like(model: nn.Module) -> Tensor:
    """A floating-point number of the network, for its device and dtype; one of its buffers if it has no parameters."""
    tensors = flatten(model.parameters(), model.buffers(), [torch.empty(0)])
    return next(tensor for tensor in tensors if tensor.is_floating_point())


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in what a network gives: in tuples, mappings and dataclasses of any kind, however nested.

    Raises:
        ValueError: there is an object of another kind in it, where tensors would be overlooked.
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # of a class of its own, which tree_leaves takes for a leaf
            found += tensors_in(list(leaf.values()))
        elif isinstance(leaf, list | tuple):
            found += tensors_in(list(leaf))
        elif is_dataclass(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, enum.Enum | nn.Module):
            raise ValueError(
                f"the network's output has a {type(leaf).__name__} in it, in which gzoo does not look for tensors; "
                "give a tensor, or a tuple, dictionary or dataclass of tensors"
            )
    return found


@contextmanager
def removing(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copied(model: nn.Module) -> Any:
    """A deep copy, also of escnn's layers: in eval mode they keep filters with the graph that made them, which torch
    does not copy."""
    kept = {id(buffer): buffer.detach() for buffer in model.buffers() if not buffer.is_leaf}
    return copy.deepcopy(model, kept)


def sign(model: "Equivariant") -> None:
    """Writes into the state_dict of ``model`` what it belongs to: N, reflections, basis and group pooling; N,
    reflections of more stages.

    A checkpoint of another group can have tensors of the same shapes (p4 and d2), as has one that pools otherwise. What
    pools nowhere, a feature extractor, names no pooling.
    """
    chain, has_head = model.chain, isinstance(model, EquivariantClassifier | EquivariantFeatures)
    pools = has_head or any(isinstance(module, GroupPool) for module in model.modules())
    found = [NAMES.index(layer.basis_name) for layer in model.modules() if isinstance(layer, ExpandedLayer)]
    # Off the grid a network says "steerable" even if all of its kernels are single pixels.
    basis = max([*found, NAMES.index("pixel" if all(group.on_grid for group in chain) else "steerable")])
    (rotations, reflections), *others = ((group.rotations, int(group.reflections)) for group in chain)
    basis_and_pool = basis + _POOL_STEP * _POOLS.index(model.group_pool.pool if pools else "")
    signature = torch.tensor([rotations, reflections, basis_and_pool, *flatten.from_iterable(others)], device="cpu")
    model.register_buffer(SIGNATURE, beside(like(model), signature))


class Equivariant(Constants, Front):
    """A converted network of any kind."""

    constants: ClassVar[tuple[str, ...]] = (SIGNATURE,)
    gzoo_prefix = "Equivariant"
    group: Group
    chain: tuple[Group, ...]
    group_pool: GroupPool

    @property
    def group_name(self) -> str:
        """The canonical name of the group, or of those of the stages: "d8:d4:d1"."""
        return groups.spell(self.chain)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, but refuses what belongs to another group, basis or architecture.

        Raises:
            ValueError: names the mismatch.
        """
        if strict or SIGNATURE in state_dict:
            require_same_group(self, state_dict)
        own = self.state_dict()
        require_same_shapes(self, state_dict, own)
        if strict:
            require_same_keys(self, state_dict, own)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As part of a larger network, whose load_state_dict calls this alone."""
        if prefix + SIGNATURE in state_dict:
            own, found = getattr(self, SIGNATURE), state_dict[prefix + SIGNATURE]
            require_same_group(self, {SIGNATURE: found})
            _require_same_pool(_values(own), _values(found))
            state_dict[prefix + SIGNATURE] = own  # which may say more than that of an older gzoo
        super()._load_from_state_dict(state_dict, prefix, *rest)


class EquivariantFeatures(Equivariant):
    """A converted network without a head that gives vectors (B, fields), pooled over the fibre.

    So whatever a user puts on top is invariant.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        pooled: Tensor = self.group_pool(y if y.ndim > 1 else y[None])  # of a batch of one, if the network squeezes it
        return pooled if y.ndim > 1 else pooled[0]


class EquivariantClassifier(Equivariant):
    """A converted timm model: its head stays invariant through timm's own calls."""

    num_classes: int
    num_features: int
    head_hidden_size: int
    says_pose = False

    @property
    def _model_args(self) -> dict[str, Any]:
        """Where timm notes the arguments that make the network again, for config.json: `gzoo.DoubleAngle` as a mapping,
        as JSON has no tuples of two kinds."""
        try:
            return self.__dict__["_model_args"]
        except KeyError as error:
            raise AttributeError("_model_args") from error

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        vectors = {
            path: [places._asdict() if isinstance(places, DoubleAngle) else places for places in channels]
            for path, channels in (args.get("vectors") or {}).items()
        }
        self.__dict__["_model_args"] = {**args, "vectors": vectors} if vectors else args

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, fields * |G|, H, W) to logits (B, num_classes), or to group-pooled features (B, fields).

        With poses the logits are (B, num_classes, |G|).

        Without a classifier (``num_classes=0``) or with ``pre_logits`` the features are pooled over pixels and over the
        fibre, so that whatever a user puts on top is invariant. Without spatial pooling they stay regular fields. A
        head that was put in the place of the one classifier is given vectors of the group-pooled features, too.
        """
        heads = classifiers(self)
        put_in = None if pre_logits else _foreign_head(self, heads)
        if put_in is not None:
            features = self.forward_head(x, pre_logits=True)
            if features.ndim == 2:
                return _own_logits(put_in, features)
        y = super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]
        if pre_logits or not any(True for head in heads for _ in head.parameters()):
            return self.group_pool(y) if y.ndim == 2 else y
        is_map_of_poses = any(isinstance(part, PoseConv2d) for head in heads for part in head.modules())
        return y.unflatten(1, (-1, self.group.order)) if is_map_of_poses else y

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """Replaces the classifier; see timm. The new one pools over the group, or says the pose, like the old one.

        Raises:
            ValueError: timm's code makes a layer there that gzoo knows no equivariant one for; or a head with a hidden
                layer would go from vectors to maps or back, which makes another layer of that.
        """
        head: Any = getattr(self, "head", None)
        has_hidden = isinstance(head, NormMlpClassifierHead) and head.hidden_size
        if has_hidden and global_pool is not None and bool(global_pool) == head.use_conv:
            raise ValueError(
                f"global_pool={global_pool!r} would exchange the hidden layer of this head, which is a convolution on "
                f"maps and linear on vectors; create the model with global_pool={global_pool!r} instead"
            )
        forget_label_names(self)
        self.__dict__.get("_model_args", {}).pop("vectors", None)  # which the new one makes no more
        kept = set(self.modules())
        self.head_hidden_size *= self.group.order  # timm's code counts channels, where there are any to count anew
        try:
            super().reset_classifier(num_classes, global_pool, **kwargs)  # type: ignore[misc]
        finally:
            self.head_hidden_size //= self.group.order
        made = [(path, module) for path, module in self.named_modules() if module not in kept]
        for path, plain in made:
            if any(True for _ in plain.parameters(recurse=False)):
                new = self._like(path, plain)
                self.set_submodule(path, new.to(next(plain.parameters())).train(self.training))

    def _like(self, path: str, plain: Any) -> nn.Module:
        """The equivariant counterpart of what timm's code made on channels for a classifier."""
        group, order, pool = self.group, self.group.order, self.group_pool.pool
        if isinstance(plain, nn.BatchNorm1d):  # before the linear layer
            return FibreNorm(nn.BatchNorm1d(plain.num_features // order, plain.eps, plain.momentum), order)
        if not isinstance(plain, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"{path}, of the new classifier, is a {type(plain).__name__}: gzoo knows linear layers there"
            )
        linear, inputs = isinstance(plain, nn.Linear), plain.weight.shape[1] // order
        options = group, inputs, plain.weight.shape[0], plain.bias is not None
        if self.says_pose:
            return (PoseLinear if linear else PoseConv2d)(*options)
        return (InvariantLinear if linear else InvariantConv2d)(*options, pool)  # a convolution: logits at every pixel


def forget_label_names(model: Any) -> None:
    """Takes the names of the classes that a network was trained on out of its config: a new classifier has others."""
    config = getattr(model, "pretrained_cfg", None)
    if config:
        config = {key: value for key, value in config.items() if not key.startswith("label_")}
        model.pretrained_cfg = model.default_cfg = config


def classifiers(model: Any) -> tuple[nn.Module, ...]:
    """The classifier of a timm model, or the two of one that was distilled; none if it has no classes."""
    if not getattr(model, "num_classes", True):  # then some of timm's get_classifier fail
        return ()
    return _heads(model)


def _heads(model: Any) -> tuple[nn.Module, ...]:
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def _foreign_head(model: Any, heads: tuple[nn.Module, ...]) -> nn.Module | None:
    """A classifier that a user put in, which has weights and knows nothing of fibres; None if there is none."""
    if not heads:  # without classes some of timm's get_classifier fail
        with suppress(Exception):
            heads = _heads(model)
    if len(heads) != 1 or getattr(heads[0], "knows_fibres", False) or not any(True for _ in heads[0].parameters()):
        return None
    return None if group_of(heads[0]) else heads[0]


def _own_logits(head: nn.Module, features: Tensor) -> Tensor:
    wanted = getattr(head, "in_features", features.shape[1])
    if wanted != features.shape[1]:
        raise ValueError(
            f"the {type(head).__name__} in the classifier's place takes {wanted} features; pooled over the fibre there "
            f"are {features.shape[1]}. model.reset_classifier(num_classes) makes a classifier that fits"
        )
    logits: Tensor = head(features[..., None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(features)
    return logits


def require_same_group(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError unless model and checkpoint are over the same group and basis, or both plain."""
    own, found = dict(model.named_buffers()).get(SIGNATURE), state_dict.get(SIGNATURE)
    wrapped = next((key for key in state_dict if key.endswith(f".{SIGNATURE}")), None)
    if found is None and own is not None and wrapped is not None:
        prefix = wrapped.removesuffix(SIGNATURE)
        raise ValueError(
            f"the names in this checkpoint begin with {prefix!r}, as those of a wrapped network do (torch.compile, "
            f"DistributedDataParallel); give {{key.removeprefix({prefix!r}): value for key, value in its items()}}"
        )
    own_values, found_values = (None if signature is None else _values(signature) for signature in (own, found))
    for values in (own_values, found_values):
        _split_off_pool(values)
    if own_values != found_values:
        raise ValueError(
            f"this checkpoint is of {_kind(found_values)}, but the model is {_kind(own_values)}: their weights mean "
            f"different filters. {_ADVICE}"
        )


def _values(signature: Tensor) -> list[int]:
    return [int(value) for value in signature.tolist()]  # of a checkpoint in half precision, or a mean, they are floats


def _require_same_pool(own_signature: list[int], found_signature: list[int]) -> None:
    own, found = _split_off_pool(own_signature), _split_off_pool(found_signature)
    if own and found and own != found:
        raise ValueError(
            f"this checkpoint is of a network with group_pool={found!r}, but the model has {own!r}, which makes other "
            f"logits of the same weights. {_ADVICE}"
        )


def pool_of(state_dict: Mapping[str, Any]) -> str:
    """How the network that a checkpoint is of pools a fibre; an empty string if it names no way."""
    signature = state_dict.get(SIGNATURE)
    return "" if signature is None else _split_off_pool(_values(signature))


def _split_off_pool(signature: list[int] | None) -> str:
    """Takes the group pooling out of a signature, in place; an empty string if it names none."""
    if signature is None or len(signature) % 2 == 0 or len(signature) == 1:
        return ""
    pool, signature[2] = divmod(signature[2], _POOL_STEP)
    return _POOLS[pool] if pool < len(_POOLS) else "a value of a newer gzoo"


def _kind(signature: list[int] | None) -> str:
    if signature is None:
        return "a plain network (or one of another library: it names no group)"
    if len(signature) == 1:
        return f"a network over {CONTINUOUS[signature[0]]}"
    if len(signature) % 2 == 0:
        return "a network of a newer gzoo"
    basis = signature.pop(2)
    chain = tuple(Group(n, bool(reflections)) for n, reflections in zip(signature[::2], signature[1::2], strict=True))
    kernels = f"the {NAMES[basis]} basis" if 0 <= basis < len(NAMES) else f"basis {basis}, of a newer gzoo"
    return f"a {groups.spell(chain)} network in {kernels}"


def require_same_keys(
    model: nn.Module, state_dict: Mapping[str, Any], own: Mapping[str, Any], besides: Collection[str] = ()
) -> None:
    """Raises ValueError if the checkpoint has other entries than the model; ``besides`` may be in one only."""
    wrong = [f"{key} is missing" for key in own if key not in state_dict and key not in besides]
    wrong += [f"{key} is not in the model" for key in state_dict if key not in own and key not in besides]
    _refuse(model, wrong)


def require_same_shapes(
    model: nn.Module, state_dict: Mapping[str, Any], own: Mapping[str, Any], besides: Collection[str] = ()
) -> None:
    """Raises ValueError if an entry of the checkpoint has another shape than the model's; ``besides`` may."""
    wrong = [
        f"{key} is {tuple(state_dict[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and key not in besides and state_dict[key].shape != own[key].shape
    ]
    _refuse(model, wrong)


def _refuse(model: nn.Module, wrong: list[str]) -> None:
    if wrong:
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"this checkpoint is of another architecture or width than the {type(model).__name__}: "
            f"{'; '.join(wrong[:3])}{rest}. Create the model that it was saved from"
        )
