"""Where pretrained weights come from: bundled model cards first, then the Hugging Face Hub; and what is refused.

A model card is a folder ``{name}.{tag}`` with README.md, config.json and model.safetensors, laid out as its Hub
repository. The cards lie inside the package in a wheel and beside it in a checkout. timm does the reading; this file
tells it where, checks what it read, and turns the errors of the libraries below into ones that say what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from timm.models._hub import load_model_config_from_path
from timm.models._pretrained import PretrainedCfg
from torch import nn

from gzoo.equivariant import require_same_group, require_same_keys, require_same_shapes

HUB_ORGANIZATION = "gzoo"

# The one file that is read from the Hub: without this timm falls back to pickles.
FILENAME = "model.safetensors"

_PACKAGE = Path(__file__).parent
_CARD_FOLDERS = (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards")


def card_folder() -> Path:
    """The folder that holds the model cards."""
    return next((folder for folder in _CARD_FOLDERS if folder.is_dir()), _CARD_FOLDERS[-1])


def pretrained_cfg(name: str, tag: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of ``{name}.{tag}``: the card's own where one is bundled, and its place on the Hub.

    timm takes ``file`` before ``hf_hub_id``.
    """
    card = card_folder() / f"{name}.{tag}"
    config: dict[str, Any] = {}
    if (card / "config.json").is_file():
        config, _, _ = load_model_config_from_path(card)
    weights = card / FILENAME
    file = str(weights) if weights.is_file() else None
    return config | {"source": None, "file": file, "hf_hub_id": f"{HUB_ORGANIZATION}/{name}.{tag}"}


def _paths(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    """timm names one module, or several."""
    return (paths,) if isinstance(paths, str) else paths


def require_fit(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """timm's ``pretrained_filter_fn``: the checkpoint as it is, if it belongs to ``model``.

    timm loads leniently once the number of classes differs, so what a foreign checkpoint lacks would stay random. What
    timm adapts may differ: the classifier, and how many channels the first convolution reads.

    Raises:
        ValueError: names the checkpoint and the mismatch.
    """
    config: Any = model.pretrained_cfg
    own, firsts = model.state_dict(), [f"{path}.weight" for path in _paths(config["first_conv"])]
    head = {f"{path}.{name}" for path in _paths(config["classifier"]) for name in ("weight", "bias")}
    try:
        require_same_group(model, state_dict)
        require_same_keys(model, state_dict, own, besides=head)
        require_same_shapes(model, state_dict, own, besides={*firsts, *head})
        declared = config["input_size"][0]
        for first in firsts:
            found = state_dict[first].shape
            if found != own[first].shape and found != (own[first].shape[0], declared, *own[first].shape[2:]):
                raise ValueError(
                    f"{first} is {tuple(found)}, but the config declares {declared} channels for it; say what it reads "
                    "with pretrained_cfg_overlay=dict(input_size=(channels, height, width))"
                )
    except ValueError as error:
        raise ValueError(f"{_place(config)}: {error}") from error
    return state_dict


@contextmanager
def explained(config: PretrainedCfg) -> Iterator[None]:
    """Turns what timm, safetensors and the Hub's client raise while they load into errors that say what to do.

    Args:
        config: says what is loaded.

    Raises:
        FileNotFoundError: the file, the repository, or its model.safetensors does not exist.
        ConnectionError: the Hub cannot be reached.
        ValueError: there are no weights, or they cannot be read or do not fit.
    """
    place = _place(config.to_dict())
    by_file = "or give a file that you have: pretrained_cfg_overlay=dict(file='...')"
    if not (config.has_weights or config.state_dict):
        raise ValueError(
            f"{config.architecture} has no pretrained weights; timm.list_pretrained() lists what has some. Create it "
            f"with pretrained=False, {by_file}"
        )
    try:
        yield
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: there is no such repository on the Hugging Face Hub, or it is private and you are not logged "
            f"in. timm.list_pretrained() lists the weights that exist, {by_file}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{place}: the Hugging Face Hub cannot be reached, or HF_HUB_OFFLINE is set, and the weights are not in "
            f"the local cache. Connect and try again, {by_file}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: the repository has no {FILENAME}, and gzoo loads no other file from the Hub: pickles can run "
            f"code. Ask its owner for one, {by_file}"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place}: no such file; give the path of a .safetensors or .pth file") from error
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{place}: the file is truncated or corrupt ({error}); download or save it again") from error
    except RuntimeError as error:
        raise ValueError(f"{place}: the weights cannot be loaded: {error}") from error


def _place(config: dict[str, Any]) -> str:
    """Where timm looks for the weights, for messages."""
    if config.get("source") != "hf-hub" and config.get("file"):
        return config["file"]
    return config.get("hf_hub_id") or config.get("url") or f"the state_dict for {config['architecture']}"
