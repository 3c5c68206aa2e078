"""Training and fine-tuning, from a recipe to a folder that `timm.create_model("local-dir:...")` loads.

One flat recipe is read into a `TrainConfig`; `train` runs it. The state at the end of every epoch is in
`checkpoint.pt`, and every random number of an epoch follows from (seed, epoch): a run that was stopped and resumed
equals, bit for bit on the same machine, the one that was not. Optimizers, schedules, losses, EMA and transforms are
timm's.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import math
import operator
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import types
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import timm
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.data.transforms import str_to_interp_mode
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models._hub import save_config_for_hf
from timm.optim import Muon, create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from tqdm import tqdm

from gzoo.augment import BatchTransform, Resident, make_resident, resident_loader
from gzoo.card import plot_curves, render_trained
from gzoo.data import (
    Augmentation,
    ImageData,
    class_folders,
    classes_without_training,
    eval_loader,
    eval_transform,
    input_config,
    open_split,
    seed_everything,
    set_epoch,
    split_names,
    split_validation,
    train_loader,
    train_transform,
)
from gzoo.equivariant import classifiers, group_of
from gzoo.evaluate import autocast, measure, precision
from gzoo.partial import subset_parameters
from gzoo.predict import count_poses, load_model, names_weights
from gzoo.soft import penalty
from gzoo.transfer import average, grow
from gzoo.weights import write_atomically
from gzoo.winograd import Winograd

CHECKPOINT = "checkpoint.pt"
SKIPPED = "skipped.txt"
_MAY_CHANGE = ("epochs", "out", "workers", "data")  # on resuming; of the data the place, not the images

# --- the recipe -----------------------------------------------------------------------------------------------------


_LIMITS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _option(default: Any, text: str, **limits: float) -> Any:
    """A field of TrainConfig; the limits, of each number in it, are those of _LIMITS."""
    return field(default=default, metadata={"help": text, "limits": limits})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a key of a recipe and a flag of `gzoo train`."""

    model: str = field(metadata={"help": "a registered model, or a folder that a run wrote"})
    data: str = field(metadata={"help": "folder of images, folder of parquet files, or dataset on the Hub"})
    out: str = field(metadata={"help": "folder for checkpoint, log, curves, results and the trained model"})
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "arguments for timm.create_model: drop_rate, in_chans ..."}
    )
    tag: str | None = _option(None, "what the weights are called after the model's name, data's folder if not given")
    pretrained: bool = _option(False, "start from pretrained weights")
    grown_from: str | None = _option(
        None, "start from a run over a subgroup (with model_args subgroup) or of a shallower network, see gzoo.grow"
    )
    averaged_with: str | None = _option(
        None, "the start becomes the mean of pretrained's or grown_from's weights and those of this run of the network"
    )
    freeze_backbone: bool = _option(False, "train the classifier only; norm statistics stay as they are")
    epochs: int = _option(
        10, "passes over the training images; 0 saves the start, such as what grown_from gives", least=0
    )
    batch_size: int = _option(64, "images a step", least=1)
    grad_accum: int = _option(
        1, "take the gradient of a batch in this many parts, one after another, to save memory", least=1
    )
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05},
        metadata={
            "help": "name, lr, weight_decay ... for timm's create_optimizer_v2; a flag changes what it names, as lr=0.1"
        },
    )
    schedule: dict[str, Any] = field(
        default_factory=lambda: {"name": "cosine"},
        metadata={"help": "name, warmup_epochs, min_lr ... for timm's create_scheduler_v2; steps at each update"},
    )
    layer_decay: float | None = _option(
        None, "learning rate factor from each layer to the one below it", above=0, most=1
    )
    subset_lr: float = _option(
        0.05, "learning rate of what the layers of a partial model keep; for Adam and its kind", least=0
    )
    label_smoothing: float = _option(0.0, "share of the target spread over all classes", least=0, below=1)
    soft_penalty: float = _option(
        0.0, "weight of gzoo.soft.penalty in the loss, for a model with model_args soft: true", least=0
    )
    mixup_alpha: float = _option(0.0, "mixup; 0 is off", least=0)
    cutmix_alpha: float = _option(0.0, "cutmix; 0 is off", least=0)
    ema_decay: float | None = _option(
        None, "validate and save a moving average of the weights, with this decay", least=0, below=1
    )
    clip_grad: float | None = _option(None, "largest norm of the gradient", above=0)
    bf16: bool = _option(False, "autocast to bfloat16, unless a CPU would emulate it, which takes many times as long")
    channels_last: bool = _option(
        False, "channels_last memory format, for plain networks: norms of fibres give the default one back"
    )
    compile: bool = _option(False, "torch.compile the model")
    winograd: bool = _option(
        False, "3x3 and 5x5 convolutions by Winograd's algorithm, see gzoo.winograd: faster in float32 on a CPU"
    )
    seed: int = _option(0, "seeds weights, order, augmentation and the validation split", least=0)
    val_fraction: float = _option(
        0.1, "share of the training images to validate on if there is no val split; 0: none", least=0, below=1
    )
    image_size: int | None = _option(None, "height and width of the images, the model's own if not given", least=1)
    image_sizes: tuple[tuple[int, int], ...] | None = _option(
        None, "progressive training: [[epochs, size], ...]; the last size stays; validation is at image_size"
    )
    mean: tuple[float, ...] | None = _option(None, "mean of each channel, the model's own if not given")
    std: tuple[float, ...] | None = _option(
        None, "standard deviation of each channel, the model's own if not given", above=0
    )
    interpolation: str | None = _option(None, "bilinear, bicubic ..., the model's own if not given")
    crop_pct: float | None = _option(
        None, "share of the image that validation crops, the model's own if not given", above=0, most=1
    )
    scale: tuple[float, float] | None = _option(
        None, "area of the random crop, 0.35 to 1 if not given", above=0, most=1
    )
    ratio: tuple[float, float] | None = _option(
        None, "aspect ratio of the random crop, 3/4 to 4/3 if not given", above=0
    )
    crop_padding: int = _option(0, "in place of scale: crop from the image padded by this many black pixels", least=0)
    rotate: float = _option(0.0, "rotate by a random angle up to this many degrees", least=0, most=180)
    zoom: tuple[float, float] | None = _option(None, "enlarge about the centre by a random factor, 0.9 to 1.1", above=0)
    shear: float = _option(0.0, "shear by a random angle up to this many degrees", least=0, below=90)
    transpose: float = _option(
        0.0, "probability of transposing it; with both flips at 0.5, all of p4m", least=0, most=1
    )
    hflip: float = _option(0.5, "probability of a horizontal flip", least=0, most=1)
    vflip: float = _option(0.0, "probability of a vertical flip", least=0, most=1)
    color_jitter: float = _option(0.0, "strength of brightness, contrast and saturation changes", least=0)
    auto_augment: str | None = _option(None, "timm's policies: rand-m9-mstd0.5, augmix-m3 ...")
    re_prob: float = _option(0.0, "probability of random erasing", least=0, most=1)
    augment_batches: bool = _option(
        False,
        "keep the training images on the device and augment whole batches there: faster, for small images of one size; "
        "without auto_augment",
    )
    workers: int = _option(0, "processes that decode and augment; changes no result", least=0)

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for name, hint in hints.items():
            value = _tuples(getattr(self, name))
            object.__setattr__(self, name, value)
            _reject_number_as_text(name, value if hint is not str else None)
            if not _fits(value, hint):
                raise ValueError(f"{name} is {value!r}; it takes {_spell(hint)}")
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, tuple) else (value,)
            for kind, limit in f.metadata.get("limits", {}).items():
                holds, words = _LIMITS[kind]
                if not all(number is None or holds(number, limit) for number in numbers):
                    raise ValueError(f"{f.name} is {value}; it must be {words} {limit}")
        if own := sorted({"num_classes", "pretrained"} & self.model_args.keys()):
            raise ValueError(f"model_args has {own[0]}; the classes follow from the data, and pretrained is an option")
        if self.tag is not None and not re.fullmatch(r"\w+", self.tag):
            raise ValueError(f"tag is {self.tag!r}; it takes letters, digits and underscores, as in resnet20.TAG")
        if self.winograd and (self.bf16 or self.compile):
            raise ValueError("winograd is for float32 and networks that are not compiled; leave out bf16 and compile")
        if any(number < 1 for pair in self.image_sizes or () for number in pair):
            raise ValueError(f"image_sizes is {self.image_sizes}; epochs and sizes must be at least 1")
        if self.pretrained and self.grown_from:
            raise ValueError("pretrained and grown_from are two starts; set one of them")
        if self.averaged_with and not (self.pretrained or self.grown_from):
            raise ValueError("averaged_with would average random weights; set pretrained or grown_from, too")
        for name in ("lr", "weight_decay"):
            if not _fits(number := self.optimizer.get(name), float | None):
                raise ValueError(f"optimizer.{name} is {number!r}; it takes a number, such as {name}=0.01")
        for name in ("optimizer", "schedule"):
            if "name" not in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; it needs a name, such as name: sgd or name: cosine")


def read_recipe(path: str) -> dict[str, Any]:
    """The entries of a recipe, one flat YAML; a key that is no field of `TrainConfig` is an error."""
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such recipe; a recipe is a YAML file such as those in recipes/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: a recipe is a list of `key: value` lines, such as `epochs: 10`")
    known = [f.name for f in fields(TrainConfig)]
    for key in entries:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"{path}: {key!r} is no entry of a recipe; the nearest is {near[0]!r}. All: {known}")
    return entries


def make_config(entries: dict[str, Any]) -> TrainConfig:
    """A `TrainConfig` from recipe entries and flags, which together must name model, data and out."""
    if missing := [name for name in ("model", "data", "out") if name not in entries]:
        raise ValueError(f"{' and '.join(missing)} missing; give {', '.join(f'--{name}' for name in missing)}")
    return TrainConfig(**entries)


def resume_config(recipe: dict[str, Any], flags: dict[str, Any]) -> TrainConfig:
    """The config of the run in `out`; what recipe and flags say on top is compared with it by `train`."""
    out = {**recipe, **flags}.get("out")
    if out is None:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    return TrainConfig(**merge({**_load_checkpoint(Path(out).expanduser())["config"], **recipe}, flags))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _reject_number_as_text(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _reject_number_as_text(f"{name}.{key}", item)
    elif isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", value):
        raise ValueError(f"{name} is the text {value!r}, not a number: YAML reads 1e-4 as text and 1.0e-4 as a number")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        items = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, value, items))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spell(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spell(arg) for arg in get_args(hint))
    words = {
        type(None): "none",
        tuple[float, float]: "two numbers, such as 0.5 and 1",
        tuple[float, ...]: "numbers, one for each channel",
        tuple[tuple[int, int], ...]: "pairs of epochs and size, such as [[2, 16], [8, 32]]",
    }
    return words.get(hint) or (hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", ""))


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Everything that one run works with."""

    config: TrainConfig
    out: Path
    device: torch.device
    train_data: ImageData | Resident
    val_data: ImageData | None
    model: nn.Module
    input: dict[str, Any]  # timm's data config, of validation and of the saved model
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Scheduler | None
    steps: int  # an epoch
    poses: int  # |G| of a model that says class and pose, else 1
    processes: PartialState  # this one and how many there are; only the main one measures, prints and writes
    epoch: int = 0  # finished ones
    rows: list[dict[str, Any]] = field(default_factory=list)  # of log.csv
    best: dict[str, Any] | None = None  # the row of the epoch that was saved to model/
    seconds: float = 0.0  # of the finished epochs
    commands: list[str] = field(default_factory=list)

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and saved."""
        return self.ema.module if self.ema else self.model


def train(config: TrainConfig, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Run a recipe, or go on with the run in `config.out`.

    Under torchrun or `accelerate launch`, each process takes its slice of every batch and the main one writes. On GPUs
    batch norms have the statistics of the whole batch (SyncBN, which torch has on GPUs only), on CPUs those of a slice.

    Writes to `config.out`: checkpoint.pt, log.csv, curves.png, results.json, skipped.txt where images were skipped, and
    model/ with the weights of the best validation epoch (of the last epoch if there is no validation).

    Returns:
        what results.json says; nothing in a process that is not the main one.

    Raises:
        FileNotFoundError, ValueError: the config cannot be run, or differs from that of the run to resume.
        FloatingPointError: the loss is not finite; the checkpoint is that of the epoch before, and none in the first.
        OSError: the disk is full; likewise.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, with what to type to go on.
    """
    out = Path(config.out).expanduser()
    processes = PartialState(cpu=not torch.cuda.is_available())
    saved = _load_checkpoint(out) if resume else None
    if saved:
        _check_same(config, saved["config"])
        if config.epochs < saved["epoch"]:
            raise ValueError(
                f"the run in {out} has had {saved['epoch']} epochs, more than epochs = {config.epochs}; give at least "
                "as many"
            )
    elif out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder as --out")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not an empty folder; give another --out, or --resume to go on with the run in it")
    processes.wait_for_everyone()  # all have looked into `out` before one writes there
    run = _set_up(config, out, processes, fresh=not resume)  # to resume needs no download
    if saved:
        _restore(run, saved)
        done = run.epoch >= config.epochs
        how = "already finished" if done else "resuming"
        processes.print(f"gzoo: {out}: {how} after epoch {run.epoch} of {config.epochs}")
        run.commands += [] if done else [command]
    else:
        run.commands = [command]
        if processes.is_main_process:
            _save_checkpoint(run)  # a run that is killed in its first epoch can be resumed, too
    try:
        if processes.is_main_process:
            batch = min(config.batch_size, len(run.train_data))
            batches = f"{run.steps} batch{'es' if run.steps > 1 else ''} of {batch} an epoch"
            if left := len(run.train_data) - run.steps * batch:
                batches += f" ({left} images, others in each, make no whole one and are left out)"
            held = f"{len(run.val_data)} to validate on" if run.val_data else "none to validate on"
            print(f"gzoo: {len(run.train_data)} images to train on, {batches}; {held}", file=sys.stderr)
        with _deterministic(), _sigterm_as_interrupt():
            _train_epochs(run)
    except KeyboardInterrupt:
        again = f"gzoo train --resume --out {shlex.quote(str(out))}"
        raise KeyboardInterrupt(f"stopped in epoch {run.epoch + 1}; go on with: {again}") from None
    except Exception:
        if not (saved or run.epoch) and processes.is_main_process:  # nothing to go on with: an empty folder again
            for name in (CHECKPOINT, SKIPPED):
                (out / name).unlink(missing_ok=True)
        raise
    return _finish(run) if processes.is_main_process else {}


def _set_up(config: TrainConfig, out: Path, processes: PartialState, fresh: bool) -> _Run:
    """Everything up to the first step. What cannot work fails here, before anything is written to `out`."""
    train_data: ImageData | Resident
    train_data, val_data = _open_data(config, out)
    device = processes.device
    if config.winograd and device.type != "cpu":
        raise ValueError(f"winograd is for CPUs, and this is a run on {device}; leave it out")
    if config.bf16 and precision(device, config.bf16) == "float32" and processes.is_main_process:
        print("gzoo: this CPU has no instructions for bfloat16, so the run is in float32", file=sys.stderr)
    seed_everything(config.seed)
    classes = len(train_data.classes)
    model = load_model(config.model, config.pretrained and fresh, num_classes=classes, **config.model_args)
    if fresh and names_weights(config.model) and not config.pretrained and processes.is_main_process:
        print(f"gzoo: starting from random weights; --pretrained starts from those of {config.model}", file=sys.stderr)
    is_random = not (config.pretrained or config.grown_from)
    if config.freeze_backbone and is_random and fresh and processes.is_main_process:
        print("gzoo: freeze_backbone keeps random weights, as pretrained is not set", file=sys.stderr)
    if config.grown_from and fresh:
        grow(model, load_model(config.grown_from, pretrained=True, num_classes=classes))
    if config.averaged_with and fresh:
        average(model, load_model(config.averaged_with, pretrained=True, num_classes=classes))
    data_config = _input_config(model, config)
    poses = _try_sizes(model, data_config, config)
    if poses > 1:
        _require_upright(model, config)
    if config.soft_penalty:
        penalty(model)  # raises if the model is not soft
    try:
        transform = train_transform(data_config, _augmentation(config))
        eval_transform(data_config)
    except (AssertionError, KeyError) as error:  # timm asserts the names of policies
        raise ValueError(f"timm knows no such auto_augment {config.auto_augment}: {error}") from error
    if config.augment_batches:
        changes = BatchTransform(data_config, _augmentation(config))
        train_data = make_resident(train_data, data_config["input_size"][0], device)
        changes(train_data.images[:1], config.seed)
    else:
        transform(train_data[0][0])
    _freeze_backbone(model, config)
    if device.type == "cuda" and processes.num_processes > 1:
        model = convert_sync_batchnorm(model)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    batch_size = min(config.batch_size, len(train_data))
    if (config.mixup_alpha or config.cutmix_alpha) and batch_size % 2:
        raise ValueError(f"mixup and cutmix pair the images of a batch; a batch of {batch_size} images is odd")
    if rest := batch_size % (count := processes.num_processes):
        raise ValueError(
            f"a batch of {batch_size} images does not divide by {count} processes; "
            f"give --batch-size {batch_size - rest + count}, or {batch_size - rest} if that is above 0"
        )
    share = batch_size // processes.num_processes
    if config.grad_accum > share:
        raise ValueError(f"grad_accum is {config.grad_accum}; a batch of {share} images has {share} parts at most")
    steps = len(train_data) // batch_size
    optimizer = _optimizer(model, config)
    schedule = _schedule(optimizer, config, steps) if config.epochs else None
    ema = None
    if config.ema_decay is not None:
        # With warm-up: an average that starts at the random weights would still be near them after a short run.
        ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); give another --out") from error
    skipped = train_data.skipped + (val_data.skipped if val_data else [])
    if skipped and processes.is_main_process:
        (out / SKIPPED).write_text("\n".join(skipped) + "\n", encoding="utf-8")
    return _Run(
        config, out, device, train_data, val_data, model, data_config, ema, optimizer, schedule, steps, poses, processes
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    name, options = config.optimizer["name"], {k: v for k, v in config.optimizer.items() if k != "name"}
    try:
        optimizer = create_optimizer_v2(model, opt=name, layer_decay=config.layer_decay, **options)
    except (TypeError, ValueError) as error:
        near = difflib.get_close_matches(name, list_optimizers(), 3) if "not found" in str(error) else []
        hint = f"; near are {', '.join(near)}, and timm.optim.list_optimizers() lists all" if near else ""
        if "unexpected keyword" in str(error):
            hint = "; the learning rate is lr, the others are those of timm's create_optimizer_v2 and of the optimizer"
        raise ValueError(f"optimizer {config.optimizer}: {error}{hint}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"optimizer {name} needs second derivatives, which gzoo does not take")
    learned = subset_parameters(model)
    if config.subset_lr != TrainConfig.subset_lr and not learned:
        raise ValueError(
            f"subset_lr is {config.subset_lr}, and {config.model} is not partial; give model_args partial=true, or "
            "leave it out"
        )
    if learned:  # at the rate of the weights they would hardly leave the whole group
        apart = set(learned)
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in apart]
        optimizer.add_param_group({"params": learned, "lr": config.subset_lr, "weight_decay": 0.0})
    return optimizer


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Scheduler | None:
    name = config.schedule["name"]
    if name == "plateau":
        raise ValueError("schedule plateau steps by epochs and metrics; choose one that steps by updates: cosine")
    options = {key: value for key, value in config.schedule.items() if key != "name"}
    try:
        warmup, cooldown = options.get("warmup_epochs", 0), options.get("cooldown_epochs", 0)
        between = config.epochs - cooldown - (warmup if options.get("warmup_prefix") else 0)  # timm adds these
        if warmup + cooldown > config.epochs or between < 1:
            raise ValueError(f"warm-up and cooldown take {warmup + cooldown} epochs, and there are {config.epochs}")
        schedule, epochs = create_scheduler_v2(
            optimizer, name, between, step_on_epochs=False, updates_per_epoch=steps, **options
        )
    except (TypeError, ValueError) as error:
        known = "; timm's are cosine, tanh, step, multistep, poly, constant, rsqrt, wsd and none"
        hint = known if "unknown" in str(error).lower() else ""
        raise ValueError(f"schedule {config.schedule}: {error}{hint}") from error
    if epochs != config.epochs:
        raise ValueError(
            f"schedule {config.schedule} runs for {epochs} epochs, the recipe for {config.epochs}; leave cycles out"
        )
    return schedule


def _open_data(config: TrainConfig, out: Path) -> tuple[ImageData, ImageData | None]:
    """Training and validation images; of the test split only the names of classes are looked at."""
    folders, place = class_folders(config.data), out.resolve()
    splits = folders or split_names(config.data)  # not both, as each walks through all images
    if any(place.is_relative_to(folder.resolve()) for folder in folders.values()):
        raise ValueError(f"{out} lies in {config.data}, whose folders are classes; give another --out")
    if folders and (unknown := classes_without_training(folders)):
        print(
            f"gzoo: {config.data}: no training images for the classes in {unknown}; `gzoo eval` will refuse that split",
            file=sys.stderr,
        )
    train_data = open_split(config.data, "train")
    if "val" in splits:
        return train_data, open_split(config.data, "val")
    if config.val_fraction == 0:
        return train_data, None
    part, held_out = split_validation(train_data, config.val_fraction, config.seed)
    part.skipped = train_data.skipped
    return part, held_out


def _input_config(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    own = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    channels = config.model_args.get("in_chans", own["input_size"][0])
    size = config.image_size or (config.image_sizes[-1][1] if config.image_sizes else None)
    shape = (channels, size, size) if size else (channels, *own["input_size"][1:])
    for key in ("mean", "std"):
        value = getattr(config, key)
        if value and len(value) not in (1, channels):
            raise ValueError(f"{key} has {len(value)} values; the model takes {channels} channels")
    try:
        str_to_interp_mode(config.interpolation or "bilinear")
    except KeyError as error:
        accepted = "nearest, bilinear, bicubic, lanczos, box and hamming"
        raise ValueError(f"interpolation is {config.interpolation!r}; accepted are {accepted}") from error
    return input_config(
        model,
        input_size=shape,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )


def _try_sizes(model: nn.Module, data_config: dict[str, Any], config: TrainConfig) -> int:
    """Push a blank image of each size through the model; |G| if it says class and pose, else 1."""
    channels, height, width = data_config["input_size"]
    model.eval()
    poses = 1
    for h, w in [(height, width)] + [(size, size) for _, size in config.image_sizes or ()]:
        try:
            with torch.no_grad():
                y = model(torch.zeros(1, channels, h, w))
        # A model that has one size says so by an assertion, one that shrinks an image to nothing by a RuntimeError.
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{config.model} cannot take images of {h}x{w} with {channels} channels: {error}. "
                f"Set image_size, or in_chans or img_size in model_args."
            ) from error
        poses = count_poses(model, y)
    return poses


def _require_upright(model: nn.Module, config: TrainConfig) -> None:
    """Pose is learned from images that are upright: what turns them would teach that every pose is upright."""
    group = group_of(model)
    assert group is not None
    nearest = 180 / group.rotations  # degrees; beyond, another pose is nearer
    most = {"hflip": 0.0 if group.reflections else 1.0, "vflip": 0.0, "transpose": 0.0, "rotate": nearest}
    for name, limit in most.items():
        if (given := getattr(config, name)) > limit:
            raise ValueError(
                f"{name} is {given}, but {config.model} learns its pose from upright images; the most is {limit:g}"
            )
    if config.auto_augment and nearest < 30:
        raise ValueError(
            f"auto_augment is {config.auto_augment}, which turns images by up to 30 degrees, but {config.model} learns "
            f"poses {2 * nearest:g} degrees apart from upright images; leave it out"
        )


def _augmentation(config: TrainConfig) -> Augmentation:
    return Augmentation(**{f.name: getattr(config, f.name) for f in fields(Augmentation)})


def _freeze_backbone(model: nn.Module, config: TrainConfig) -> None:
    if config.freeze_backbone:
        model.requires_grad_(False)
        for classifier in classifiers(model):
            classifier.requires_grad_(True)


def _training_mode(model: nn.Module, config: TrainConfig) -> None:
    # In eval mode a norm uses its statistics and leaves them, whatever class of norm it is.
    model.train(not config.freeze_backbone)
    if config.freeze_backbone:
        for classifier in classifiers(model):
            classifier.train()


def _size_at(config: TrainConfig, epoch: int, default: int) -> int:
    """The size of training images in an epoch, counted from 0."""
    end = 0
    for epochs, size in config.image_sizes or ():
        end += epochs
        if epoch < end:
            return size
    return config.image_sizes[-1][1] if config.image_sizes else default


def _train_epochs(run: _Run) -> None:
    config = run.config
    model = DistributedDataParallel(run.model) if run.processes.num_processes > 1 else run.model
    forward = torch.compile(model, dynamic=False) if config.compile else model
    val = None
    if run.val_data:
        val = eval_loader(run.val_data, eval_transform(run.input), config.batch_size, config.workers, run.device)
    bar = tqdm(
        total=config.epochs * run.steps,
        initial=run.epoch * run.steps,
        unit="step",
        disable=None if run.processes.is_main_process else True,
    )
    with bar:
        while run.epoch < config.epochs:
            start = time.perf_counter()
            size = _size_at(config, run.epoch, run.input["input_size"][1])
            bar.set_description(f"epoch {run.epoch + 1}/{config.epochs}")
            train_loss, lr = _train_one_epoch(run, forward, size, bar)
            trained = time.perf_counter() - start
            if not run.processes.is_main_process:
                run.epoch += 1
                continue
            row: dict[str, Any] = {"epoch": run.epoch + 1, "lr": lr}
            row |= {"train_loss": train_loss, "val_loss": "", "val_top1": ""}
            if val:
                measured = measure(run.validated, val, run.device, config.bf16)["upright"]
                if not math.isfinite(measured["loss"]):
                    raise _not_finite(run, f"the validation loss after epoch {run.epoch + 1}", measured["loss"])
                row |= {"val_loss": measured["loss"], "val_top1": measured.get("pose_top1", measured["top1"])}
            seconds = time.perf_counter() - start
            images = run.steps * min(config.batch_size, len(run.train_data))
            row |= {"seconds": round(seconds, 3), "images_per_second": round(images / trained, 1), "size": size}
            run.epoch, run.seconds, run.rows = run.epoch + 1, run.seconds + seconds, [*run.rows, row]
            if _is_best(row, run.best):
                run.best = row
                export(run.validated, run.out / "model", run.input, run.train_data.classes, config)
            _save_checkpoint(run)
            bar.write(_describe(row))


def _train_one_epoch(run: _Run, forward: Any, size: int, bar: tqdm) -> tuple[float, float]:
    """One pass over the training images; returns the mean loss and the last learning rate."""
    config, device = run.config, run.device
    loader = _epoch_loader(run, size)
    seed_everything(config.seed, run.epoch)
    if index := run.processes.process_index:  # dropout of its own; numpy's mixup stays that of the whole batch
        torch.manual_seed(torch.initial_seed() + index)
    _training_mode(run.model, config)
    mixup, loss_function = _loss(config, len(run.train_data.classes) * run.poses)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    convolutions = Winograd() if config.winograd else contextlib.nullcontext()
    subsets = {id(parameter) for parameter in subset_parameters(run.model)}  # which learn at a rate of their own
    of_weights = [g for g in run.optimizer.param_groups if subsets.isdisjoint(map(id, g["params"]))]
    mean_loss, pending = AverageMeter(), None
    update = run.epoch * run.steps
    if run.schedule:
        run.schedule.step_update(update)
    for step, (images, labels) in enumerate(loader, 1):
        images = images.to(device, non_blocking=True)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True) * run.poses  # upright: at the identity (see `gzoo.pose_loss`)
        if mixup:
            images, labels = mixup(images, labels)
        # Every process reads the whole batch: augmentation and mixup draw once for all of it.
        share = len(images) // run.processes.num_processes
        own = slice(share * run.processes.process_index, share * (run.processes.process_index + 1))
        images, labels = images[own], labels[own]
        run.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        parts = zip(images.tensor_split(config.grad_accum), labels.tensor_split(config.grad_accum), strict=True)
        for part, targets in parts:
            with autocast(device, config.bf16), convolutions:
                logits = _forward(forward, part).flatten(1)
            loss = loss_function(logits.float(), targets)
            if config.soft_penalty:
                loss = loss + config.soft_penalty * penalty(run.model)
            loss = loss * (len(part) / len(images))
            loss.backward()
            total += loss.detach()
        if config.clip_grad is not None:
            dispatch_clip_grad(parameters, config.clip_grad)
        emulated = run.device.type == "cpu" and isinstance(run.optimizer, Muon)
        with _InFloat32() if emulated else contextlib.nullcontext():
            run.optimizer.step()
        update, lr = update + 1, max(group["lr"] for group in of_weights)
        if run.ema:
            run.ema.update(run.model, step=update)
        if run.schedule:
            run.schedule.step_update(update)
        if pending is not None:
            mean_loss.update(_finite(run, pending, step - 1))
        pending = total  # read a step later: reading at once would make a GPU wait for the next launch
        bar.update()
        bar.set_postfix(loss=f"{mean_loss.avg:.3f}", refresh=False)
    assert pending is not None  # there is at least one step
    mean_loss.update(_finite(run, pending, run.steps))
    # Over shares of one size; with one process it stays what it is.
    losses = gather_object([mean_loss.avg])
    return sum(losses) / len(losses), lr


class _InFloat32(TorchFunctionMode):
    """Lets timm's Muon orthogonalize its steps in float32: in bfloat16, a CPU that has to emulate it would be longer at
    that than at the network."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") == torch.bfloat16:
            kwargs = kwargs | {"dtype": torch.float32}
        return func(*args, **kwargs)


def _forward(model: Any, images: Tensor) -> Tensor:
    try:
        return model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"a batch norm has one value a channel here, of which there are no statistics: {error}. Give a batch_size "
            "of 2 or more (for each process and part of grad_accum), or larger images"
        ) from error


def _epoch_loader(run: _Run, size: int) -> DataLoader:
    shape = (run.input["input_size"][0], size, size) if run.config.image_sizes else run.input["input_size"]
    config, data = run.config, run.train_data
    input_config, augmentation = {**run.input, "input_size": shape}, _augmentation(config)
    if isinstance(data, Resident):
        loader = resident_loader(data, BatchTransform(input_config, augmentation), config.batch_size, config.seed)
    else:
        transform = train_transform(input_config, augmentation)
        loader = train_loader(data, transform, config.batch_size, config.seed, config.workers, run.device)
    set_epoch(loader, run.epoch)
    return loader


def _loss(config: TrainConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    if config.mixup_alpha or config.cutmix_alpha:
        mixup = Mixup(
            config.mixup_alpha, config.cutmix_alpha, label_smoothing=config.label_smoothing, num_classes=num_classes
        )
        return mixup, SoftTargetCrossEntropy()
    if config.label_smoothing:
        return None, LabelSmoothingCrossEntropy(config.label_smoothing)
    return None, nn.CrossEntropyLoss()


def _finite(run: _Run, loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise _not_finite(run, f"the loss in epoch {run.epoch + 1}, step {step}", value)
    return value


def _not_finite(run: _Run, what: str, value: float) -> FloatingPointError:
    held = f"{run.out / CHECKPOINT} holds the state after epoch {run.epoch}. " if run.epoch else ""
    return FloatingPointError(
        f"{what} is {value}; stopped. {held}A smaller learning rate, warmup_epochs in schedule, or clip_grad usually "
        "helps."
    )


def _is_best(row: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Higher top1, then lower loss; without validation the latest epoch is the best."""
    if best is None or row["val_top1"] == "":
        return True
    return (row["val_top1"], -row["val_loss"]) > (best["val_top1"], -best["val_loss"])


def _describe(row: dict[str, Any]) -> str:
    val = f"  val loss {row['val_loss']:.4f}  val top1 {row['val_top1']:.2f}%" if row["val_top1"] != "" else ""
    return (
        f"epoch {row['epoch']}  lr {row['lr']:.3g}  train loss {row['train_loss']:.4f}{val}  "
        f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """cuDNN without its random algorithms, for this run only."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what a run writes ----------------------------------------------------------------------------------------------


def _save_checkpoint(run: _Run) -> None:
    state = {
        "config": asdict(run.config),
        "epoch": run.epoch,
        "model": run.model.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),  # the schedule is a function of the update and has no state
        "rows": run.rows,
        "best": run.best,
        "seconds": run.seconds,
        "commands": run.commands,
        "classes": run.train_data.classes,
        "n_train": len(run.train_data),
        "labels": _checksum(run),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(run.out / CHECKPOINT, buffer.getvalue())
    _write_log(run)


def _write_log(run: _Run) -> None:
    if run.rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(run.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.rows)
        write_atomically(run.out / "log.csv", text.getvalue().encode())


def _load_checkpoint(out: Path) -> dict[str, Any]:
    path = out / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, nothing to resume; without --resume a new run starts")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the zip reader, the unpickler or the tensor reader raise
        raise ValueError(
            f"{path} is no readable checkpoint ({type(error).__name__}); start anew in another --out"
        ) from error


def _check_same(config: TrainConfig, saved: dict[str, Any]) -> None:
    before, now = asdict(TrainConfig(**saved)), asdict(config)
    if differing := [f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if k not in _MAY_CHANGE and before[k] != now[k]]:
        raise ValueError(
            f"the run in {config.out} had another config ({'; '.join(differing)}); on resuming only "
            f"{', '.join(_MAY_CHANGE)} may change. Start another run in another --out."
        )


def _restore(run: _Run, saved: dict[str, Any]) -> None:
    if (saved["classes"], saved["n_train"]) != (run.train_data.classes, len(run.train_data)):
        raise ValueError(
            f"{run.config.data} has changed since the run began: {saved['n_train']} training images of the classes "
            f"{saved['classes']} then, {len(run.train_data)} of {run.train_data.classes} now"
        )
    if saved.get("labels", (now := _checksum(run))) != now:  # not in the checkpoints of older versions
        raise ValueError(f"{run.config.data} has changed since the run began: other images, or in another order")
    run.model.load_state_dict(saved["model"])
    if run.ema:
        run.ema.module.load_state_dict(saved["ema"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.epoch, run.rows, run.best, run.seconds = saved["epoch"], saved["rows"], saved["best"], saved["seconds"]
    run.commands = saved["commands"]


def _checksum(run: _Run) -> int:
    """Of the labels of all images, in order: it changes where images come, go or change their class."""
    labels = torch.as_tensor(run.train_data.labels).tolist() + [-1] + (run.val_data.labels if run.val_data else [])
    return zlib.crc32(str(labels).encode())


def export(model: nn.Module, folder: Path, data: dict[str, Any], classes: list[str], config: TrainConfig) -> None:
    """Write config.json and model.safetensors for `timm.create_model("local-dir:FOLDER", pretrained=True)`, and
    README.md for the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".config.json.tmp"
    model_config = {"label_names": classes, "pretrained_cfg": {"tag": config.tag or Path(config.data).name}}
    group = getattr(model, "group_name", None)
    if group:
        model_config["gzoo"] = {"group": group}
    # Drop rates belong to the training, not to the model that it gives.
    model_args = {key: value for key, value in config.model_args.items() if not key.endswith("_rate")}
    try:
        save_config_for_hf(model, str(temporary), model_config, model_args, data)
        text = temporary.read_bytes()
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(folder / "config.json", text)
    readme = render_trained(json.loads(text)["architecture"], group, classes)
    write_atomically(folder / "README.md", readme.encode())
    # Contiguous copies: safetensors refuses channels_last and shared memory.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _finish(run: _Run) -> dict[str, Any]:
    _write_log(run)
    if run.rows:
        write_atomically(run.out / "curves.png", plot_curves(run.rows))
    if not (run.out / "model" / "model.safetensors").is_file():  # no epoch at all, or someone removed it
        run.best = run.rows[-1] if run.rows else None
        export(run.validated, run.out / "model", run.input, run.train_data.classes, run.config)
    best = run.best or {}
    results = {
        "config": asdict(run.config),
        "command": "; ".join(run.commands),
        "seed": run.config.seed,
        "machine": machine(run.device) | {"processes": run.processes.num_processes},
        "dtype": precision(run.device, run.config.bf16),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "seconds": round(run.seconds, 1),
        "epochs": run.epoch,
        "best_epoch": best.get("epoch"),
        "best_val_top1": None if best.get("val_top1") == "" else best.get("val_top1"),
        "n_train": len(run.train_data),
        "n_val": len(run.val_data) if run.val_data else 0,
        "log": run.rows,
    }
    if run.config.grown_from:
        folder = Path(run.config.grown_from).expanduser()  # a run, or model/ in it
        earlier = [path for of in (folder, folder.parent) if (path := of / "results.json").is_file()]
        if earlier:
            results["grown_from"] = json.loads(earlier[0].read_text(encoding="utf-8"))
    write_atomically(run.out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    of = f"of epoch {best['epoch']}" if best else "that the run started with"
    print(f"gzoo: {run.out / 'model'} holds the weights {of}", file=sys.stderr)
    return results


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run were measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


# --- flags ----------------------------------------------------------------------------------------------------------


def merge(recipe: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags over recipe entries over defaults; of a mapping such as `optimizer`, only the given keys change."""
    merged = {**recipe, **flags}
    for f in fields(TrainConfig):
        if isinstance(flags.get(f.name), dict):
            before = recipe.get(f.name, f.default_factory() if callable(f.default_factory) else {})
            merged[f.name] = {**before, **flags[f.name]} if isinstance(before, dict) else before
    return merged
