"""The recipe: a plain CNN becomes its equivariant counterpart, layer by layer.

`convert` walks a plain network and replaces each leaf by the rule for its type (`gzoo.rules`), in the widths that
`gzoo.plan` chose; the network's own classes, and with them everything that timm lets one do with them, stay. What no
rule knows is an error. `gzoo.transfer` carries weights over, where that is wanted. Then the result checks itself.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain as flatten
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._input import update_model_args
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gzoo import groups
from gzoo.bases import BasisName
from gzoo.check import ROUNDING, KeepDouble, first_broken_layer, in_channels, input_size, leaves, relative_error
from gzoo.equivariant import EquivariantClassifier, group_of, make_equivariant, removing, tensors_in
from gzoo.groups import Group
from gzoo.nn import FibreNorm, GroupMapNorm, PoseConv2d, PoseLinear, Restriction, VectorPool, restrict_output
from gzoo.nn.expand import ExpandedLayer
from gzoo.nn.fibre import share_along_fibre
from gzoo.nn.functions import SymmetricForward, act_symmetrically
from gzoo.nn.idle import Idle
from gzoo.nn.linear import Head, Pooling
from gzoo.nn.resample import Window
from gzoo.partial import make_partial
from gzoo.plan import SIDES, WHOLE_NETWORK, Fit, Match, Plan, Vectors, bent_logits, example, plan
from gzoo.rules import ON_IMAGE, RULES, WHOLE, Recipe, Rule, rule
from gzoo.segments import Segments, flat, total
from gzoo.soft import make_soft, residuals
from gzoo.trace import READ_FLATTENED, without_numbers
from gzoo.transfer import Weights, fill

__all__ = ["convert", "rule"]

# Modules with others in them whose own forward is another in training.
_KNOWN_IN_TRAINING = (ExpandedLayer, FibreNorm, GroupMapNorm, nn.modules.batchnorm._BatchNorm)

_CHECKED_SIZES = (64, 128, None)  # pixels; the first that is large enough, else the network's own input size


def convert(
    model: nn.Module,
    group: str | Group,
    match: Match | None = None,
    widths: Mapping[int, int] | None = None,
    group_pool: Pooling = "mean",
    basis: BasisName | None = None,
    classifier: str | Sequence[str] | None = None,
    weights: Weights | None = None,
    head: Head = "invariant",
    partial: bool = False,
    soft: bool = False,
    vectors: Vectors | None = None,
) -> nn.Module:
    """The equivariant counterpart of a plain CNN; ``model`` itself stays as it is.

    Args:
        model: a plain network (B, C, H, W) -> logits, for the image or for each pixel: a timm model or any
            ``nn.Module`` of known layers.
        group: a name that `gzoo.groups.get` knows, or a group. Or the groups of the stages, "d8:d4:d1", each a subgroup
            of the one before: one for each stage, the last one for all that follow. Stages are the levels of timm's
            ``feature_info`` without the stem; the map behind one is read as fields of the next group
            (`gzoo.nn.Restriction`), so that small structures keep a symmetry that the whole image does not have
            (Weiler & Cesa 2019, arXiv:1911.08251, section 2.7).
        match: what to keep of the plain network: its "params" (C / sqrt|G| fields for C channels), its "flops" (C / |G|
            fields, the cost of the plain network), or its "width" (C fields, C * |G| channels). The first two to 10%,
            save for narrow networks over large groups, where a single field is too much; ``gzoo plan`` says how much.
            None is what ``weights`` need: "params" for fresh ones, "width" for "transfer", "flops" for "project".
        widths: plain channels -> fields, where they differ from ``match``; for fresh weights only.
        group_pool: how the classifier pools a fibre, "mean" or "max"; "mean" with ``weights``.
        basis: of the kernels: "pixel", "steerable" (band-limited, as escnn's) or "steerable_3r" (frequencies up to 3r
            on the ring of radius r); None: pixel for groups on the grid, else steerable.
        classifier: path of the layer that makes the logits, or a list of those of a network with several outputs; ""
            if none does, and the output stays regular fields. By default it is timm's classifier, or else the last
            layer with parameters, if that is linear, or a convolution whose map is pooled to a vector or is the output
            (segmentation, an autoencoder, super-resolution, also by a pixel shuffle); and the linear layers whose
            numbers stand beside its in the output, or are summed up with them. A map that a norm, an activation of
            hidden layers such as ReLU or a sum made of it is one of features, unless it has as many channels as the
            image, or fewer, up to four (a warning says so of a map as large as the image, as decoders give it); any
            other function may follow, and scores that no other layer reads may be summed up (FCN, DeepLab), or
            activated beside others. So are several maps of different sizes, unless 1x1 convolutions made them all. Maps
            that a network gives in training only count, too. Where a feature extractor ends in global pooling, its
            fibres are pooled. A vector beside a map is an error that asks for the paths.
        weights: where the weights start.

            None: fresh ones.

            "transfer": in eval mode the logits are the mean over g of the plain network's logits of g^-1 x, wherever
            its windows cover the image symmetrically: (n + 2p - k) % s == 0 at each layer. So a ResNet wants 225
            pixels, not 224, as its 3x3 windows of stride 2 need odd sizes; the 2x2 windows of a ConvNeXt fit 224. At
            other sizes the resampling rule changes the function, and the logits are invariant all the same. Groups on
            the pixel grid only. Norms over channels or pixels (layer, group and instance norm, GRN) act on each element
            of the fibre by itself here. Batch norms share their statistics along the fibre: the same in eval mode,
            while in train mode they see all poses as one batch. The cost is about |G|^2 times the plain network's.

            "project": the plain network's C channels are read as C / |G| fields, and each weight becomes the nearest
            one that is equivariant. Filters that are equivariant come back as they were; of those of a network that
            was trained without, whose channels are no fields, about 1 / |G| of the sum of squares is left.

            `gzoo.transfer` has the formulas.
        head: "invariant" logits, or "pose": logits (B, classes, |G|) of class and group element, with fresh weights.
            The classifier is linear, or the 1x1 convolution of a timm network.
        partial: whether each convolution learns which elements of the group it keeps, starting with all: see
            `gzoo.partial` and `gzoo.nn.Subset`. Not for softmax attention between channels and activations with
            f(0) != 0.
        soft: whether each convolution gets a plain one beside it, which starts at zero and which `gzoo.soft.penalty`
            holds there: see `gzoo.soft`. Not with ``partial``.
        vectors: where numbers have directions: the channels that are vectors (right, down), such as a flow, by the path
            of the convolution or linear layer that makes them, as in {"flow": [(0, 1)]}. They turn with the image; the
            layer's other channels are logits. For numbers up, give the negative to the loss. What half a turn brings
            back, such as an orientation or an ellipticity, is a `gzoo.DoubleAngle` (0, 1). More channels than two are
            numbers of as many directions, evenly spaced, from the left clockwise, which change places: the distances of
            a pixel to the sides of a box, {"box": [(0, 1, 2, 3)]} for left, top, right and bottom, or 32 rays to the
            border of a cell. Opposite directions may share a channel: (0, 1, 0, 1) are a width and a height, which
            quarter turns exchange. Not with ``partial``, ``head="pose"`` and "project".

    Returns:
        The network; ``model.group`` is its group, the last one of several. Feature maps are (B, fields * |G|, H, W).
        Logits of an image are invariant; a map of logits is trivial fields, which move with the image. TensorFlow's
        "same" padding (timm's tf_ models), a pixel more on one side, becomes symmetric: the same sizes, other values.
        So do functions that the network's own forward calls (`gzoo.nn.functions`), and a linear layer over a flattened
        map reads it by a convolution as large, or makes one by the adjoint. Layers that never run are left out, with a
        warning.

    Raises:
        ValueError: a module has no equivariant counterpart here, or cannot take over its ``weights``, or the result is
            not equivariant; names the module. Or the options do not go together.
    """
    _require_convertible(model, group)
    if weights is None:
        _require_trainable(model)
    copied = copy.deepcopy(model)
    with torch.device("cpu"):  # new layers move to the model's device; a default device of "meta" would empty them
        converted = convert_in_place(
            copied, group, match, widths, group_pool, basis, classifier, weights, None, head, partial, soft, vectors
        )
        check_itself(converted)
        if weights == "transfer":
            _check_mean(model, converted, bent_logits(model, classifier, vectors), vectors or {})
    return converted


def _require_convertible(model: Any, group: Any) -> None:
    """Raises ValueError for what is no network of plain layers; else each would fail far from its cause."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r:.60}, a {type(model).__name__}; gzoo.convert takes a network, an nn.Module as "
            "timm.create_model('resnet18') gives it"
        )
    if not isinstance(group, str | Group):
        raise ValueError(f"group is {group!r}; accepted are names such as 'p4m' or 'd8:d4:d1', and a gzoo.groups.Group")
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        kind = f"{path or 'the network'} is a {type(module).__module__}.{type(module).__qualname__}"
        if isinstance(module, OptimizedModule):
            raise ValueError(f"{kind}, which torch.compile made; convert the network first, then compile the result")
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise ValueError(f"{kind}, a recorded graph, not layers; convert the network that it was made from")
        if computed := [k for k, v in vars(module).items() if isinstance(v, Tensor) and not v.is_leaf]:
            raise ValueError(
                f"{kind} that holds a computed {computed[0]}, as torch.nn.utils.weight_norm and prune leave one, which "
                "torch does not copy; take it off first (remove_weight_norm, prune.remove)"
            )
        if type(module).__module__.startswith(("torch.ao.nn.", "torch.ao.quantization.")):
            raise ValueError(f"{kind}, of a quantized network; convert the float network that it was made from")
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{kind} whose weights are parametrized; take that off first, with "
                "torch.nn.utils.parametrize.remove_parametrizations, and put it on the converted layer"
            )
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(f"{kind}, which has no weights before it has run; run the network once on an image first")
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owners:
                raise ValueError(
                    f"{kind} whose {name} is that of {owners[id(parameter)]} as well, and each would get its own here; "
                    "use the same module at both places, or give each its own"
                )
            owners[id(parameter)] = path
    own = () if group_of(model) else ("group", "chain", "group_pool")  # which says below that it is converted already
    if taken := [name for name in own if hasattr(model, name)]:
        raise ValueError(
            f"{type(model).__name__} has an attribute {taken[0]}, which is where a converted network keeps its own; "
            "give it another name"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where the converted network cannot be checked; convert one "
            "with real numbers, as model.to_empty(device='cpu') and its initialization or checkpoint give them"
        )


def _require_trainable(model: nn.Module) -> None:
    """Raises ValueError where a frozen layer would get fresh weights: they would stay random, or train unasked."""
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")  # no parameter under spectral norm, whose hook is refused later
        if isinstance(module, _ConvNd | nn.Linear) and weight is not None and not weight.requires_grad:
            raise ValueError(
                f"{path} is frozen, and its new weights are fresh; convert before you freeze, "
                "or take over what it has learned by weights='transfer' or 'project'"
            )


def convert_in_place(
    model: nn.Module,
    group: str | Group,
    match: Match | None = None,
    widths: Mapping[int, int] | None = None,
    group_pool: Pooling = "mean",
    basis: BasisName | None = None,
    classifier: str | Sequence[str] | None = None,
    weights: Weights | None = None,
    fitted: Fit | None = None,
    head: Head = "invariant",
    partial: bool = False,
    soft: bool = False,
    vectors: Vectors | None = None,
) -> nn.Module:
    """`convert`, but uses up ``model`` and does not check the result; for networks that a test checks.

    ``fitted`` are the widths of a plan of a network like ``model``, in place of those that ``match`` leads to.
    """
    chain = groups.chain(group) if isinstance(group, str) else (group,)
    if weights is not None:
        _require_agreement(weights, chain, match, widths, group_pool, basis)
    if head not in ("invariant", "pose") or (head == "pose" and weights is not None):
        raise ValueError(f"head is {head!r} with weights={weights!r}; accepted are 'invariant', and 'pose' without")
    if vectors and (partial or head == "pose" or weights == "project"):
        raise ValueError(
            f"vectors={vectors!r:.60} does not go with partial=True, head='pose' and weights='project'; leave those out"
        )
    planned = plan(model, chain, match or _MATCH[weights], widths, fitted, basis, classifier, weights is None, vectors)
    for path, module in _coupling(model, planned):
        if weights == "transfer":
            raise ValueError(
                f"{path or type(model).__name__}: its forward takes a mean, maximum, norm, softmax or product over "
                "channels, which is the same for all poses here, and each pose's own in the plain network; convert "
                "with fresh weights"
            )
        module.one_for_all_poses = True  # for `gzoo.grow`
    gives_fibres = classifier is None and planned.gives_fibres  # asked before its layers are replaced
    recipe = Recipe(planned, group_pool, per_element=weights == "transfer", head=head)
    plain = model if weights is None else copy.deepcopy(model)
    counts = _channel_counts(model, recipe.plan)
    if planned.idle:
        warnings.warn(
            f"left out of the converted {type(model).__name__}, as they run on no image, neither in evaluation nor in "
            f"training: {', '.join(sorted(planned.idle))}",
            stacklevel=3,
        )
    if planned.trace.tables:
        warnings.warn(
            f"{', '.join(sorted(planned.trace.tables))} of {type(model).__name__}: a linear layer makes the same "
            "vector of an image in each pose, so the table or map that is made of it stays as it is when the image "
            "turns. For a map that turns, put a convolution behind it",
            stacklevel=3,
        )
    converted = _walk(model, recipe, {})
    counts()
    if weights is not None:
        fill(converted, plain, chain[0], weights)
    make_equivariant(converted, chain, group_pool, gives_fibres)
    if planned.vector_outputs:
        converted.vector_outputs = planned.vector_outputs  # type: ignore[assignment]  # what gzoo.check goes by
    if not isinstance(converted, EquivariantClassifier) and not gives_fibres:  # which pool such vectors
        converted.field_outputs = planned.field_outputs  # type: ignore[assignment]  # so are these
    _restrict(converted, planned)
    if isinstance(converted, EquivariantClassifier):
        converted.says_pose = head == "pose"
    to_come = isinstance(converted, EquivariantClassifier)  # timm's networks without classes may get some later
    if head == "pose" and not _has_pose(converted) and (planned.classifiers or not to_come):
        raise ValueError(
            f"head='pose' needs a linear classifier, or a 1x1 convolution in a network with timm's forward_head, as "
            f"p4m_unet has; those of {type(model).__name__} are {sorted(planned.classifiers)}. Give the path of a "
            "linear one as classifier, or classifier='' for a map of regular fields, field * |G| + g"
        )
    if partial:
        if len(chain) > 1 or head == "pose":
            raise ValueError("partial=True learns subsets of one group for invariant logits; leave out stages and head")
        make_partial(converted, chain[0], group_pool, image_for(copy.deepcopy(converted).eval()))
    if soft:
        make_soft(converted)
    asked: dict[str, Any] = {"match": match or _MATCH[weights], "basis": basis, "head": head, "partial": partial}
    asked |= {"soft": soft, "vectors": vectors or None}
    _rename(converted, chain, {name: value for name, value in asked.items() if value != OPTIONS[name]})
    if not input_size(converted) and planned.side != SIDES[0]:  # it takes others only
        converted.pretrained_cfg = {"input_size": (in_channels(converted), planned.side, planned.side)}  # type: ignore[assignment]
    return converted


def _coupling(model: nn.Module, planned: Plan) -> list[tuple[str, Any]]:
    """The modules that make channels depend on each other by no rule of ours, by path; logits of a classifier may."""
    outputs = planned.trace.outputs
    logits = {part for path in planned.classifiers for part in flat(outputs.get(path, ()))}
    coupled = [
        (path, model.get_submodule(path))
        for path, own in planned.trace.coupled
        if not (logits.issuperset(flat(own)) or all(part.image for part in flat(own)))
    ]
    softmax = nn.Softmax, nn.LogSoftmax, nn.Softmax2d  # whose rule leaves them as they are
    return [(path, module) for path, module in coupled if type(module) not in RULES or isinstance(module, softmax)]


def _has_pose(model: nn.Module) -> bool:
    """Whether the logits are of poses; those of a convolution are taken apart in timm's forward_head."""
    kinds = (PoseLinear, PoseConv2d) if isinstance(model, EquivariantClassifier) else PoseLinear
    return any(isinstance(module, kinds) for module in model.modules())


_MATCH: dict[Weights | None, Match] = {None: "params", "transfer": "width", "project": "flops"}


def _require_agreement(
    weights: Weights,
    chain: tuple[Group, ...],
    match: Match | None,
    widths: Mapping[int, int] | None,
    group_pool: Pooling,
    basis: BasisName | None,
) -> None:
    """Raises ValueError if the options of `convert` do not go together."""
    if weights not in _MATCH:
        raise ValueError(f"weights is {weights!r}; accepted are 'transfer', 'project', and None for fresh ones")
    if match not in (None, _MATCH[weights]) or widths:
        raise ValueError(
            f"weights={weights!r} fills the widths of match={_MATCH[weights]!r}, which is its default; leave match and "
            "widths out, or weights for fresh ones"
        )
    if group_pool != "mean":
        raise ValueError(
            f"weights={weights!r} needs group_pool='mean': the plain classifier is linear, the maximum not"
        )
    if len(chain) > 1:
        raise ValueError(
            f"weights={weights!r} fills one group through all stages, and {groups.spell(chain)} are several; give one, "
            "or leave weights out for fresh ones"
        )
    group = chain[0]
    if weights == "transfer" and (basis not in (None, "pixel") or not group.on_grid):
        raise ValueError(
            f"steerable kernels of {group.name} are turned between the pixels, where a plain one does not say how it "
            "goes on; transfer to p4 or p4m in the pixel basis, or take weights='project'"
        )


def _walk(module: nn.Module, recipe: Recipe, done: dict[nn.Module, nn.Module]) -> nn.Module:
    path, seen = recipe.path, recipe.plan.trace
    for name, child in list(module._modules.items()):
        if child is None or type(module) in WHOLE:
            continue
        at = f"{path}.{name}" if path else name
        if child not in done:  # a module may stand at two places
            done[child] = Idle(at) if at in recipe.plan.idle else _walk(child, recipe.at(at), done)
        setattr(module, name, done[child])
    if path in seen.pieces:
        _update_sizes(module, seen.widths[path], seen.pieces[path] + seen.prefixes[path], recipe.plan)
    is_leaf = not any(True for _ in module.children())
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    its_rule = _rule_for(module)
    if own and path in seen.flattened and not isinstance(module, READ_FLATTENED):
        raise ValueError(
            f"{path}: a {type(module).__name__} of a flattened map holds numbers that a turn of the image would "
            "exchange; put it where the map is one, or take nn.BatchNorm1d"
        )
    if its_rule is not None:
        own_rule = its_rule.__module__ == ON_IMAGE[0].__module__
        if path in seen.inputs and recipe.lifts and own_rule and its_rule not in ON_IMAGE:
            return module
        try:
            new = _like(module, its_rule(module, recipe))
            kinds = ("forward_pre", "forward", "backward_pre", "backward")
            hooks = [hook for kind in kinds for hook in getattr(module, f"_{kind}_hooks").values()]
            if hooks and new is not module:
                raise ValueError(
                    f"it has a hook, {hooks[0]!r:.80}, which would not go over to the layer in its place; take it off "
                    "first (such as with torch.nn.utils.remove_spectral_norm) and put one on the converted layer"
                )
            return new
        except ValueError as error:
            raise ValueError(f"{path or type(module).__name__}: {error}") from error
    own = _share_own(module, own, recipe)
    if own or (is_leaf and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and _is_known(module)):
        raise ValueError(_unknown(path, module, own))
    if path in seen.one_sided and recipe.per_element:
        raise ValueError(
            f"{path or type(module).__name__}: its forward pads or crops one side of a map, and no mean over poses "
            "does; pad or crop as many pixels on either side, or convert with fresh weights"
        )
    return act_symmetrically(module, recipe.plan.calls) if path in seen.asymmetric else module


def _share_own(module: nn.Module, own: list[str], recipe: Recipe) -> list[str]:
    """Shares parameters that hold one number a channel along the fibre, in place.

    Single numbers, several that are taken one by one, and such of the image's channels stay as they are. So do tables
    that no forward writes to and that have no number a channel, such as the ones by which HoVer-Net enlarges a map:
    whether it turns with the image all the same, the self-check sees. Returns the names of what is none of these.
    """
    unknown, given = [], recipe.plan.trace.inputs.get(recipe.path, ())
    for name in own:
        tensor: Tensor = getattr(module, name)
        is_table = sum(size > 1 for size in tensor.shape) > 1 and total(given) not in tensor.shape
        if tensor.numel() == 1 or (is_table and (f"{recipe.path}.{name}").removeprefix(".") in recipe.plan.constants):
            continue
        channels = flat(recipe.plan.trace.own.get(recipe.path, {}).get(name, ()))
        are_followed = bool(channels) and recipe.plan.followed.issuperset(channels)
        if channels and all(segment.image for segment in channels):
            continue
        if not are_followed or name in module._buffers or any(segment.image for segment in channels):
            unknown.append(name)
            continue
        dim = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
        share_along_fibre(module, (name,), recipe.group.order, recipe.plan.fields(channels, recipe.path), dim)
    return unknown


def _rule_for(module: nn.Module) -> Rule | None:
    """The rule for the module's type; for a layer norm of one's own, which turns maps for it say, that of its base."""
    found = RULES.get(type(module))
    return RULES[nn.LayerNorm] if found is None and isinstance(module, nn.LayerNorm) else found


def _is_known(leaf: nn.Module) -> bool:
    """Whether a leaf is of torch or timm, so that a rule is missing. Another's without weights is what its forward
    does, which was followed like that of the network around it, and is checked with it."""
    return type(leaf).__module__.startswith(("torch.", "torchvision.", "timm."))


def _update_sizes(module: nn.Module, names: set[str], pieces: list[tuple[int, Segments]], plan: Plan) -> None:
    """Brings the numbers of channels by which a module's forward splits a map, its attributes ``names``, up to date."""

    sizes = [size for size, _ in pieces]
    for name in names:
        value = getattr(module, name)
        if type(value) is int:
            setattr(module, name, plan.channels(pieces[sizes.index(value)][1]))
        else:
            starts = [i for i in range(len(sizes)) if sizes[i : i + len(value)] == list(value)]
            if starts:
                found = [plan.channels(segments) for _, segments in pieces[starts[0] : starts[0] + len(value)]]
                setattr(module, name, type(value)(found))


def _like(plain: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` in the mode, on the device and in the dtype of ``plain``."""
    tensor = next((parameter for parameter in plain.parameters() if parameter.is_floating_point()), None)
    if new is plain or tensor is None:
        return new if new is plain else new.train(plain.training)
    return new.train(plain.training).to(tensor.device, tensor.dtype)


def _unknown(path: str, module: nn.Module, own: list[str] | None = None) -> str:
    holds = f" with parameters or buffers of its own ({', '.join(own)})" if own else ""
    return (
        f"{path or 'the network'} is a {type(module).__module__}.{type(module).__qualname__}{holds}, which gzoo has no "
        "equivariant counterpart for. Replace it in the plain network by layers that gzoo knows (convolution, batch, "
        "group and layer norm, pointwise activation, pooling, linear), or teach it with gzoo.rule. "
        f"{WHOLE_NETWORK}"
    )


def _channel_counts(model: Any, plan: Plan) -> Callable[[], None]:
    """Finds the channel counts that timm's code reads back from its models; the result brings them up to date."""
    order, seen = plan.groups[-1].order, plan.trace
    totals = {sum(part.size for part in flat(segments)): segments for segments in seen.outputs.values()}
    for classifier in plan.classifiers & seen.inputs.keys():  # of all maps that are as wide, the one that is meant
        last = seen.inputs[classifier]
        totals[sum(part.size for part in flat(last))] = last
    todo: list[tuple[Callable[[int], None], Segments | None, int]] = []
    for module in (model, getattr(model, "head", None)):
        for name in ("num_features", "in_features"):
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(module, nn.Linear):
                todo.append((functools.partial(setattr, module, name), totals.get(value), 1))
    if isinstance(getattr(model, "head_hidden_size", None), int):  # what forward_head gives before the classifier
        todo.append((functools.partial(setattr, model, "head_hidden_size"), totals.get(model.head_hidden_size), order))
    info = getattr(model, "feature_info", None)
    for level in getattr(info, "info", info) or ():
        segments = seen.outputs.get(level.get("module"))
        if "num_chs" not in level:  # of a network of one's own, whose stages are enough
            continue
        if segments is None or sum(part.size for part in flat(segments)) != level["num_chs"]:
            segments = totals.get(level["num_chs"])
        todo.append((functools.partial(level.__setitem__, "num_chs"), segments, 1))

    def update() -> None:
        for change, segments, share in todo:
            if segments is not None:
                change(plan.channels(segments) // share)

    return update


def _restrict(model: nn.Module, plan: Plan) -> None:
    """Puts a `Restriction` behind each stage that the group changes after, and says in feature_info what levels are."""
    for path, (group, subgroup) in zip(plan.stages, pairwise(plan.groups), strict=True):
        if group != subgroup:
            restrict_output(model.get_submodule(path), group, subgroup)
    info = getattr(model, "feature_info", None)
    for level in (getattr(info, "info", info) or ()) if plan.stages else ():
        path = level["module"]
        level["group"] = plan.groups[plan.stages.index(path) + 1] if path in plan.stages else plan.group_at(path)


# Of the zoo's entries, too: `timm.create_model` takes them, with these defaults.
OPTIONS: dict[str, Any] = {
    "match": "params",
    "basis": None,
    "head": "invariant",
    "partial": False,
    "soft": False,
    "vectors": None,
}


def _rename(model: Any, chain: tuple[Group, ...], model_args: dict[str, Any]) -> None:
    """Names the network in timm's config after its group, with the arguments that make it by that name from the zoo,
    and drops where the plain weights came from."""
    config = getattr(model, "pretrained_cfg", None)
    if config:
        config = filter_pretrained_cfg(config, remove_source=True) | {"tag": None}
        config["architecture"] = f"{groups.spell(chain).replace(':', '')}_{config.get('architecture')}"
        model.pretrained_cfg = model.default_cfg = config
        update_model_args(model, **model_args)


def check_itself(model: nn.Module) -> None:
    """Runs random images in all poses, in float64, through a copy of ``model`` with random norms and biases.

    Also at odd sizes, where windows of even stride without resampling show, if the network takes such.

    Raises:
        ValueError: the outputs do not transform with the image; names the first layer that fails.
    """
    group = group_of(model)
    assert group is not None
    probe, x = randomized(model)
    modes = (False, True) if _has_idle_layers(probe, x) else (False,)
    containers = [
        module
        for module in probe.modules()
        if any(True for _ in module.children()) and not isinstance(module, _KNOWN_IN_TRAINING)
    ]
    restrictions = [module for module in probe.modules() if isinstance(module, Restriction)]
    stages = [
        (group if after is None else after.before, (before, after))
        for before, after in pairwise((None, *restrictions, None))
    ]
    for training in modes:
        for module in containers:
            module.training = training  # which its own forward asks for; dropouts and norms stay as they are
        if training and _is_random(probe, x):
            return  # as it is meant to be there, so that nothing can be compared
        for image in flatten([x], odd_images(probe, x)):
            for own, stage in stages:
                _check_poses(probe, image, own, stage)
    if not isinstance(probe, EquivariantClassifier) or any(isinstance(m, SymmetricForward) for m in probe.modules()):
        _check_oblong(probe, x, stages[-1][0])


def _check_oblong(probe: nn.Module, x: Tensor, group: Group) -> None:
    """Raises ValueError if the outputs do not follow an oblong image, whose sides a forward may mix up."""
    if group.rotations % 4:
        return  # as no turn exchanges them
    width = x.shape[3]
    for oblong in (x[..., : width // 2 + 1], x[..., : width // 2], F.pad(x, (0, width // 2, 0, 0), mode="reflect")):
        if _refuses(probe, oblong, x):
            continue
        try:
            calibrate(probe, oblong)
            broken = first_broken_layer(probe, oblong, group, group.grid_generators[:1], inner=False)
        except Exception:  # a network for squares, or for other sizes, says so in any way
            continue
        if broken is not None:
            raise ValueError(
                f"{type(probe).__name__} is not equivariant at {oblong.shape[2]}x{oblong.shape[3]} pixels, though on "
                "squares it is: look for a function in its forward that treats height and width unlike"
            )
        return


def _has_idle_layers(probe: nn.Module, x: Tensor) -> bool:
    """Whether some layers do not run in evaluation, such as auxiliary heads; of timm's networks that is not asked."""
    if isinstance(probe, EquivariantClassifier):
        return False
    idle = {module for module in probe.modules() if isinstance(module, ExpandedLayer)}
    with removing([m.register_forward_hook(lambda m, inputs, y: idle.discard(m)) for m in set(idle)]), KeepDouble():
        probe(x)
    return bool(idle)


@torch.no_grad()
def randomized(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """A float64 copy in eval mode that shows what a fresh network hides, and an image (1, C, H, W) for it.

    What starts constant is random: scales, biases, layers and branches that start at zero, but for what makes a network
    soft. Tamely, or rounding grows with depth where there are no norms. Batch norms have the statistics of two images,
    or the image fades away with depth.
    """
    probe = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    soft = {id(residual) for residual in residuals(probe)}
    for name, tensor in (*probe.named_parameters(), *probe.named_buffers()):
        if tensor.is_floating_point() and tensor.ndim <= 1:
            random = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_((random - 0.5) / 5 if name.endswith(("bias", "mean")) else (random + 1) / 2)
        elif tensor.is_floating_point() and not tensor.any() and id(tensor) not in soft:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    x = image_for(probe)
    calibrate(probe, x)
    return probe, x


@torch.no_grad()
def _check_mean(plain: nn.Module, converted: nn.Module, logits: Collection[str], vectors: Vectors) -> None:
    """Raises ValueError unless the outputs of ``converted``, filled from ``plain``, are the mean of its over all poses.

    Those of the network, or of the layers ``logits``, if there are any, where it bends those (to probabilities). Both
    with other weights, which hide nothing, at an image size that all windows fit, if one of two does. Not for networks
    with layers of timm: there are some that become symmetric by being changed.
    """
    group = group_of(converted)
    layers = [module for module in plain.modules() if not any(True for _ in module.children())]
    if group is None or any(type(leaf).__module__.startswith("timm.") for leaf in layers):
        return
    probe, image = randomized(plain)
    odd = next(odd_images(probe, image), None)  # changes the statistics of the norms
    twin = copy.deepcopy(converted).double().eval()
    fill(twin, probe, group, "transfer")
    for x in (image,) if odd is None else (image, odd):
        with KeepDouble(), _windows_fit(twin) as fits:
            found = _outputs(twin, x, logits)
        if not all(fits):
            continue
        with KeepDouble():
            poses = [_outputs(probe, group.transform_image(x, group.inverse(g)), logits) for g in range(group.order)]
        for (path, y), *rest in zip(found, *poses, strict=True):
            turned, pairs = [z for _, z in rest], vectors.get(path)
            # Three dimensions are a map of one channel, or a table of numbers.
            ways = [turned] if y.ndim < 4 else []
            ways += [[group.transform_image(z, g) for g, z in enumerate(turned)]] if y.ndim > 2 else []
            if pairs:
                ways = [[group.transform_vectors(z, g, pairs) for g, z in enumerate(turned)]]
            means = [torch.stack(way).mean(0) for way in ways if len({z.shape for z in way}) == 1]
            if means and y.ndim > 1 and y.shape[1] == means[0].shape[1] * group.order:
                y = y.unflatten(1, (-1, group.order)).mean(2)
            if min((relative_error(y, mean) for mean in means), default=math.inf) > ROUNDING:
                raise ValueError(
                    f"{type(plain).__name__} is not carried over: with weights='transfer' the output differs from the "
                    "mean over all poses. Look for a step in its forward that mixes channels, or counts or splits them "
                    "by a number that is no attribute, or puts maxima back on the first of equal ones "
                    "(return_indices); or convert with fresh weights"
                )
        return


def _outputs(network: nn.Module, x: Tensor, paths: Collection[str]) -> list[tuple[str, Tensor]]:
    """What the network gives for x, or, if there are any ``paths``, what the modules there give, and which."""
    given: list[tuple[str, Tensor]] = []

    def record(module: nn.Module, inputs: Any, y: Tensor, path: str) -> None:
        given.append((path, y.clone()))  # an activation in place may follow

    hooks = [(network.get_submodule(path), functools.partial(record, path=path)) for path in paths]
    with removing([module.register_forward_hook(hook) for module, hook in hooks]):
        y = network(x)
    return given or [("", tensor) for tensor in tensors_in(y)]


@contextmanager
def _windows_fit(model: nn.Module) -> Iterator[list[bool]]:
    """Collects whether the windows of each layer that runs cover its input symmetrically, as they stand.

    And whether the functions in a forward are symmetric as they stand. ``model`` is a copy, made for this.
    """
    fits: list[bool] = []

    def record(module: nn.Module, inputs: Any) -> None:
        window: Any = module.window
        rooms = [size + window.padding - window.extent for size in inputs[0].shape[2:]]
        fits.append(window.padding % 2 == 0 and all(room % window.stride == 0 for room in rooms))

    for module in model.modules():
        if isinstance(module, SymmetricForward):
            module.gzoo_fits = fits
    layers = [module for module in model.modules() if isinstance(getattr(module, "window", None), Window)]
    with removing([module.register_forward_pre_hook(record) for module in layers]):
        yield fits


def odd_images(probe: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """x (1, C, H, W), of even sides, at other sizes, until each map in the network has had an odd side, if it can.

    64 pixels stay even behind five strides of two, 65 odd behind windows of three pixels with padding, 63 behind those
    of two, and 4, 8 or 16 more are odd behind two, three or four strides of any. A size that the network does not take,
    or, but for the first, that makes no further map odd, is left out; x itself is given if its sides are odd. ``probe``
    is calibrated for each.
    """
    fits = [pixels for pixels in (1, 4, 8, 16) if pixels < x.shape[-1]]
    more = [F.pad(x, (0, pixels, 0, pixels), mode="reflect") for pixels in fits]
    sizes = (more[0], x[..., 1:, 1:], *more[1:]) if x.shape[-1] % 2 == 0 else (x,)
    odd: dict[tuple[nn.Module, int], bool] = {}  # the maps into and out of each layer
    first = True

    def record(module: nn.Module, inputs: tuple[Any, ...], y: Any) -> None:
        for end, z in enumerate((*inputs[:1], y)):
            if isinstance(z, Tensor) and z.ndim == 4:
                odd[module, end] = odd.get((module, end), False) or z.shape[2] % 2 == 1

    with removing([module.register_forward_hook(record) for _, module in leaves(probe)]):
        for image in sizes:
            before = dict(odd)
            if before and all(before.values()):
                return
            if _refuses(probe, image, x):
                continue
            try:
                calibrate(probe, image)
            except Exception:  # a network for other sizes of image, which says so in any way: an assertion, say
                odd = before
                continue
            if first or sum(odd.values()) > sum(before.values()):
                first = False
                yield image


def _refuses(probe: nn.Module, image: Tensor, x: Tensor) -> bool:
    """Whether a network that says which size it takes runs on no image of another, without arithmetic, which is soon
    said. False if it does not run without on x either."""
    if not input_size(probe) or isinstance(probe, EquivariantClassifier):
        return False
    return _runs_without_numbers(probe, x) and not _runs_without_numbers(probe, image)


def _runs_without_numbers(probe: nn.Module, x: Tensor) -> bool:
    copied = without_numbers(probe)
    for module in copied.modules():
        module._forward_hooks.clear()
    try:
        with torch.no_grad():
            copied(x.to("meta"))
    except Exception:  # a network for other sizes says so in any way, by an assertion, say
        return False
    return True


@torch.no_grad()
def calibrate(probe: nn.Module, x: Tensor) -> None:
    """Gives batch norms the statistics of x (1, C, H, W) and of its mirror image with exchanged colours.

    With those of another size, squeezed gates let the numbers grow from block to block, and rounding with them.
    """
    norms = [m for m in probe.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        with KeepDouble():
            probe(torch.cat((x, x.roll(1, 1).flip(-2))))
    finally:
        for norm in norms:  # and no others, whose filters are expanded already
            norm.eval()


def image_for(probe: nn.Module) -> Tensor:
    """The smallest random image, (1, C, H, W), of the sizes tried that the converted network takes."""
    reason: Exception | None = None
    sizes: list[dict[str, Any]] = [{"most": most} for most in _CHECKED_SIZES]
    if not input_size(probe):
        sizes = [{"side": side} for side in SIDES if side % 2 == 0]  # at odd ones, strides of two are symmetric already
    for size in sizes:
        x = example(probe, **size)[:1]
        for image in (x, x.sigmoid()):  # numbers as photographs have them: of others there may be no root or logarithm
            try:
                with _path_in_errors(probe), torch.no_grad(), KeepDouble():
                    output = probe(image)
            except Exception as error:  # a network for other sizes says so in any way, by an assertion, say
                reason = error if input_size(probe) else reason or error
                break
            if all(y.is_meta or y.isfinite().all() for y in tensors_in(output)):
                return image
    if reason is None:
        raise ValueError(
            f"the converted {type(probe).__name__} gives numbers that are not finite, so it cannot be checked: for "
            "random images, normal ones and such between 0 and 1"
        )
    raise ValueError(
        f"the converted {type(probe).__name__} does not run ({reason}). Plain widths that its forward fixes in numbers "
        "must be kept as an attribute, or taken from the shape of a map. If it takes apart the logits that a layer "
        f"makes, name that layer, as in classifier='head'. {WHOLE_NETWORK}"
    ) from reason


@contextmanager
def _path_in_errors(model: nn.Module) -> Iterator[None]:
    """Puts the path of the layer that ran last, a leaf or one with parameters, before the message of an error."""
    last = ""

    def hook(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            nonlocal last
            last = name

        return enter

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
    ]
    with removing([module.register_forward_pre_hook(hook(name)) for name, module in layers]):
        try:
            yield
        except Exception as error:
            raise ValueError(f"at {last}: {str(error) or type(error).__name__}") from error


@torch.no_grad()
def _is_random(probe: nn.Module, x: Tensor) -> bool:
    """Whether a network gives something else for x when it is asked again."""
    with KeepDouble():
        first, second = tensors_in(probe(x)), tensors_in(probe(x))
    return len(first) != len(second) or any(
        not y.nan_to_num().equal(z.nan_to_num()) for y, z in zip(first, second, strict=True)
    )


def _check_poses(
    probe: nn.Module,
    x: Tensor,
    group: Group,
    stage: tuple[nn.Module | None, nn.Module | None],
) -> None:
    at_size = f"under {group.name} at {x.shape[-2]}x{x.shape[-1]} pixels"
    broken = first_broken_layer(probe, x, group, group.grid_generators, stage)
    if broken is not None and _is_random(probe, x):
        raise ValueError(
            f"{type(probe).__name__} gives two results for one image, in evaluation, too, so its symmetry cannot be "
            "checked: let what is random in it, such as a dropout, depend on self.training"
        )
    if broken and not broken.startswith("["):
        module = probe.get_submodule(broken)
        raise ValueError(
            f"{broken} ({type(module).__name__}) is not equivariant {at_size}: neither its output nor any permutation "
            "of it follows the image. Look for a step just before it that treats some pixels or channels unlike "
            "others: a shift, a padding or a crop of one axis, a step along pixels that does not start at the first, "
            "steps or pads of maps with channels last, a position embedding, a split of channels"
        )
    if broken is not None:
        has_vectors = any(isinstance(module, VectorPool) for module in probe.modules())
        of_vectors = ". Angles, activations and scales of vectors are to be taken outside the network"
        raise ValueError(
            f"the output{broken} of {type(probe).__name__} is not equivariant {at_size}, though each module is: look "
            "for a step in its forward that treats some pixels or channels unlike others, such as a shift or a crop of "
            "one axis. If it takes apart the logits that a layer makes, name that layer, as in classifier='head'"
            f"{of_vectors if has_vectors else ''}"
        )
