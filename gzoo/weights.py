"""Where pretrained weights come from: bundled model cards first, then the Hugging Face Hub; and what is refused.

A model card is a folder ``{name}.{tag}`` with README.md, config.json and model.safetensors, laid out as its Hub
repository. The cards lie inside the package in a wheel and beside it in a checkout, and with them pins.csv: for each
weight the SHA-256 of its file and the commit of the Hub that has it. timm does the reading; this file tells it where,
checks what it reads, and turns the errors of the libraries below into ones that say what to do.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from timm.models._hub import hf_split, load_model_config_from_path
from timm.models._pretrained import PretrainedCfg
from torch import nn

from gzoo.equivariant import pool_of, require_same_group, require_same_keys, require_same_shapes

HUB_ORGANIZATION = "gzoo"

# The one file that is read from the Hub: without this timm falls back to pickles.
FILENAME = "model.safetensors"

# What a partial or soft network has beside its equivariant twin, and that starts with the whole group.
_RELAXED = (".subset.logits", ".residual")

_PACKAGE = Path(__file__).parent
_CARD_FOLDERS = (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards")


def card_folder() -> Path:
    """The folder that holds the model cards."""
    return next((folder for folder in _CARD_FOLDERS if folder.is_dir()), _CARD_FOLDERS[-1])


class Pin(NamedTuple):
    """What the weights of a card must be: a line of pins.csv.

    Attributes:
        weight: NAME.TAG.
        sha256: of its model.safetensors.
        revision: the commit of the Hub that has it; "" as long as none has.
    """

    weight: str
    sha256: str
    revision: str


def pins(folder: Path | None = None) -> dict[str, Pin]:
    """The lines of pins.csv by weight; ``folder`` has the cards, by default those of gzoo."""
    path = (folder or card_folder()) / "pins.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["weight"]: Pin(**row) for row in csv.DictReader(file)}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at every moment, also after a crash, `path` is the old one or the new one, complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            state = "the one from before is intact" if path.exists() else "it does not exist"
            raise OSError(f"{path} cannot be written, {state}: {error}. Is the disk full?") from error
        raise


def write_pin(card: Path, revision: str = "") -> None:
    """Writes the line of a card into the pins.csv beside it. Weights that have not changed keep their revision."""
    known = pins(card.parent)
    sha256 = hashlib.sha256((card / FILENAME).read_bytes()).hexdigest()
    old = known.get(card.name)
    if old is not None and old.sha256 == sha256:
        revision = revision or old.revision
    known[card.name] = Pin(card.name, sha256, revision)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Pin._fields, *sorted(known.values())])
    write_atomically(card.parent / "pins.csv", text.getvalue().encode())


def pretrained_cfg(name: str, tag: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of ``{name}.{tag}``: the card's own where one is bundled, and its place on the Hub.

    timm takes ``file`` before ``hf_hub_id``.
    """
    weight = f"{name}.{tag}"
    card, pin = card_folder() / weight, pins().get(weight)
    config: dict[str, Any] = {}
    if (card / "config.json").is_file():
        config, _, _ = load_model_config_from_path(card)
    file = str(card / FILENAME) if (card / FILENAME).is_file() else None
    hf_hub_id = f"{HUB_ORGANIZATION}/{weight}" + (f"@{pin.revision}" if pin and pin.revision else "")
    return config | {"source": None, "file": file, "hf_hub_id": hf_hub_id}


def verified(config: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What to lay over ``config`` so that timm reads the file whose SHA-256 is the one in pins.csv.

    Args:
        config: of a registered weight; of the Hub, its file is downloaded first.
        cache_dir: of the Hub's files, by default that of its client.

    Returns:
        The file; nothing for weights that the caller named (a file, a state_dict, a repository) or that have no pin.

    Raises:
        ValueError: the file has another SHA-256.
    """
    pin = pins().get(f"{config.architecture}.{config.tag}")
    if pin is None or config.source or config.state_dict:
        return {}
    own = pretrained_cfg(config.architecture or "", config.tag or "") | {"hf_hub_filename": FILENAME}
    if any(getattr(config, key) != own[key] for key in ("file", "hf_hub_id", "hf_hub_filename")):
        return {}
    if config.file:
        path, repair = Path(config.file), "Reinstall gzoo"
    else:
        repository, revision = hf_split(config.hf_hub_id or "")
        path = Path(hf_hub_download(repository, FILENAME, revision=revision, cache_dir=cache_dir))
        repair = "Delete it from the cache and try again; if it then differs still, do not trust it"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != pin.sha256:
        raise ValueError(
            f"{path.resolve()} is not the file of {pin.weight} that gzoo was published with: its SHA-256 is {found}, "
            f"not {pin.sha256}. {repair}"
        )
    return {"file": str(path)}


def _paths(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    """timm names one module, or several."""
    return (paths,) if isinstance(paths, str) else paths


def require_fit(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """timm's ``pretrained_filter_fn``: the checkpoint as it is, if it belongs to ``model``.

    timm loads leniently once the number of classes differs, so what a foreign checkpoint lacks would stay random. What
    timm adapts may differ: the classifier, and how many channels the first convolution reads. A partial or soft network
    starts from a checkpoint of its equivariant twin as the function that this is.

    Raises:
        ValueError: names the checkpoint and the mismatch.
    """
    config: Any = model.pretrained_cfg
    own, firsts = model.state_dict(), [f"{path}.weight" for path in _paths(config["first_conv"])]
    heads = tuple(f"{path}." for path in _paths(config["classifier"]))
    head = {key for key in {**own, **state_dict} if key.startswith(heads)}
    relaxed = {name: own[name] for name, _ in model.named_parameters() if name.endswith(_RELAXED)}
    starts = bool(relaxed) and not any(name in state_dict for name in relaxed)
    state_dict = {**state_dict, **relaxed} if starts else state_dict
    try:
        drops = starts and any(name.endswith(_RELAXED[0]) for name in relaxed)
        if drops and (pool := pool_of(state_dict)) != pool_of(own):
            raise ValueError(
                f"it is of a network that pools a fibre {f'by {pool}' if pool else 'in a way not named'}; this one, "
                f"which may drop elements, pools by {pool_of(own)}, which makes other logits of the same weights"
            )
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
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{place}: there is no such repository or revision on the Hugging Face Hub, or it is private and you are "
            f"not logged in. timm.list_pretrained() lists the weights that exist, {by_file}"
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
