"""From image files to class names and probabilities, by a registered model or a folder that `gzoo train` wrote."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from gzoo.data import decode_file, eval_transform, input_config
from gzoo.equivariant import group_of, like


def names_weights(name: str) -> bool:
    """Whether a name is that of weights, not of an architecture alone: a folder, hf-hub:NAME or NAME.TAG."""
    return Path(name).expanduser().is_dir() or ":" in name or "." in name


def load_model(name: str, pretrained: bool, **model_args: Any) -> nn.Module:
    """`timm.create_model` that also takes a folder: one with config.json and model.safetensors, or a run's `out`.

    Raises:
        FileNotFoundError: the name is a path, and there is no such folder.
        ValueError: there is no such model, it has no weights, or they do not fit or cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{name}: there is no config.json in it; a folder with a model is the --out of `gzoo train`, which "
                "writes it after the first epoch, or the model/ in it"
            )
        name = f"local-dir:{folder}"
    elif ":" not in name:
        if "/" in name:
            raise FileNotFoundError(f"{name}: no such folder; a model is a folder, a registered name or hf-hub:NAME")
        if not timm.is_model(name.split(".")[0]):
            near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
            hint = f"near are {', '.join(near)}. " if near else ""
            raise ValueError(f"{name}: no such model; {hint}`timm.list_models()` lists all after import gzoo")
        if pretrained and not timm.models.is_model_pretrained(name):
            raise ValueError(f"{name}: there are no pretrained weights; `timm.list_pretrained()` lists what has some")
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(f"{name}: it cannot be fetched from the Hugging Face Hub: {error}") from error
    # AttributeError: timm looks for the layers that the config of the weights names.
    except (RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{name}: the model cannot be built, or its weights cannot be loaded: {error}") from error


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first, or why it could not be read."""

    path: str
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


@torch.no_grad()
def predict(model: nn.Module, paths: list[str], topk: int = 5) -> list[Prediction]:
    """Classify image files; one that cannot be read gives a `Prediction` with `error`, and the others go on.

    Of a model with poses the pairs of class and pose are ranked, and both named.

    Raises:
        ValueError: topk is less than one.
    """
    if topk < 1:
        raise ValueError(f"topk is {topk}; at least one class is printed")
    model.eval()
    transform = eval_transform(input_config(model))
    parameter = like(model)
    predictions = []
    for path in paths:
        if Path(path).is_dir():
            predictions.append(Prediction(path, error="a folder; give the files in it, as in photos/*.png"))
            continue
        try:
            image = decode_file(path)
        except Exception as error:  # PIL's plugins raise a dozen kinds on broken bytes
            predictions.append(Prediction(path, error=f"{type(error).__name__}: {error}"))
            continue
        answer = model(transform(image)[None].to(parameter))
        group = group_of(model) if count_poses(model, answer) > 1 else None
        logits = answer[0].float()  # (classes,), or with poses (classes, |G|)
        names = label_names(model, len(logits))
        if group is not None:
            names = [f"{name}, pose {group.label(g)}" for name in names for g in range(group.order)]
        best = logits.flatten().softmax(0).topk(min(topk, len(names)))
        indices = best.indices.tolist()
        predictions.append(Prediction(path, tuple(names[i] for i in indices), tuple(best.values.tolist())))
    return predictions


def count_poses(model: nn.Module, logits: Any) -> int:
    """|G| for logits (B, classes, |G|), which say class and pose; 1 for those of classes alone, (B, classes).

    Raises:
        ValueError: they are neither: maps, features or a dictionary.
    """
    group = group_of(model)
    if isinstance(logits, torch.Tensor) and logits.ndim == 3 and group is not None and logits.shape[2] == group.order:
        return group.order
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} gives no logits (B, classes), so it is no classifier of images; "
            "`gzoo train`, eval and predict are for those, and other networks take a loop of your own"
        )
    return 1


def label_names(model: nn.Module, num_classes: int) -> list[str]:
    """The class names that the model's weights came with, else the class numbers."""
    return own_label_names(model, num_classes) or [str(i) for i in range(num_classes)]


def own_label_names(model: nn.Module, num_classes: int) -> list[str]:
    """The class names that the model's weights came with; none if they came without, or for other classes."""
    config: Any = getattr(model, "pretrained_cfg", {})  # which a network that is not timm's lacks
    names = config.get("label_names")
    names = list(names.values()) if isinstance(names, dict) else list(names or [])
    return names if len(names) == num_classes else []
