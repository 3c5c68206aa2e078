"""Where pretrained weights come from: bundled model cards first, then the Hugging Face Hub.

A model card is a folder ``{name}.{tag}`` with README.md, config.json and model.safetensors, laid out as its Hub
repository. The cards lie beside the package in a checkout and inside it in a wheel.
"""

import json
from pathlib import Path
from typing import Any

HUB_ORGANIZATION = "gzoo"

_PACKAGE = Path(__file__).parent
_CARD_FOLDERS = (_PACKAGE.parent / "model_cards", _PACKAGE / "model_cards")


def card_folder() -> Path:
    """The folder that holds the model cards."""
    return next((folder for folder in _CARD_FOLDERS if folder.is_dir()), _CARD_FOLDERS[0])


def pretrained_cfg(name: str, tag: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of ``{name}.{tag}``: the card's own where one is bundled, and its place on the Hub.

    timm takes ``file`` before ``hf_hub_id``.
    """
    source: dict[str, Any] = {"hf_hub_id": f"{HUB_ORGANIZATION}/{name}.{tag}"}
    card = card_folder() / f"{name}.{tag}"
    config = card / "config.json"
    if config.is_file():
        source |= json.loads(config.read_text())["pretrained_cfg"]
    weights = card / "model.safetensors"
    if weights.is_file():
        source["file"] = str(weights)
    return source
