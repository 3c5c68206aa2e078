"""Publishing and loading through the real client of the Hub, against a server on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gzoo.cli import main
from gzoo.hub import planned
from gzoo.weights import card_folder
from tests.hub_server import TOKEN, Hub, hub

CARD = "p4_cnn7.rotmnist"


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as running:
        yield running


def run(server: Hub, home: Path, *code: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Python in another process, whose Hub is ``server`` and whose cache is ``home``."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, timeout=120)


def push(server: Hub, home: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    return run(server, home, "-m", "gzoo.cli", "push", *arguments, token=token)


def load(server: Hub, home: Path, name: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    code = (
        "import timm, gzoo, torch; "
        f"a, b = (timm.create_model(n, pretrained=True).eval() for n in ({name!r}, {CARD!r})); "
        "x = torch.rand(2, 1, 28, 28); print(a.group_name, torch.equal(a(x), b(x)))"
    )
    return run(server, home, "-c", code, token=token)


def test_a_pushed_card_loads_in_another_process(server: Hub, tmp_path: Path) -> None:
    pushed = push(server, tmp_path / "writer", CARD, "--org", "lab")
    assert pushed.returncode == 0, pushed.stderr
    assert f"{server.url}/lab/{CARD}/commit/{server.commits[f'lab/{CARD}']}" in pushed.stdout
    folder = card_folder() / CARD
    assert server.files[f"lab/{CARD}"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = load(server, tmp_path / "reader", f"hf-hub:lab/{CARD}", token="")
    assert loaded.stdout == "p4 True\n", loaded.stderr
    pinned = load(server, tmp_path / "pinned", f"hf-hub:lab/{CARD}@{server.commits[f'lab/{CARD}']}", token="")
    assert pinned.stdout == "p4 True\n", pinned.stderr
    again = push(server, tmp_path / "writer", CARD, "--org", "lab")  # the repository exists
    assert again.returncode == 0, again.stderr


def test_a_private_repository_loads_with_a_token_only(server: Hub, tmp_path: Path) -> None:
    assert push(server, tmp_path, CARD, "--org", "lab", "--private").returncode == 0
    assert load(server, tmp_path / "owner", f"hf-hub:lab/{CARD}").stdout == "p4 True\n"
    stranger = load(server, tmp_path / "stranger", f"hf-hub:lab/{CARD}", token="")
    assert stranger.returncode == 1
    assert "401 Unauthorized" in stranger.stderr


def test_a_busy_hub_is_asked_again(server: Hub, tmp_path: Path) -> None:
    server.commit(f"lab/{CARD}", {path.name: path.read_bytes() for path in (card_folder() / CARD).iterdir()})
    server.failures += [("resolve/main/config.json", 429), ("cdn/", "drop")]
    loaded = load(server, tmp_path, f"hf-hub:lab/{CARD}", token="")
    assert loaded.stdout == "p4 True\n", loaded.stderr
    assert not server.failures


@pytest.fixture
def here(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, as the Hub of this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def test_a_dry_run_uploads_nothing(here: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", CARD, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert f"gzoo/{CARD}" in shown
    assert not here.requests


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        ((CARD, "--org", "lab"), "hf_wrong", "the Hub refused (401). Log in with a token that may write to lab"),
        ((CARD, "--org", "closed"), TOKEN, "the Hub refused (403)"),
        ((CARD, "--org", "two words"), TOKEN, "two words/p4_cnn7.rotmnist is no name of a repository"),
        (("nope.nothing",), TOKEN, "nope.nothing: no card and no folder of that name"),
    ],
)
def test_what_is_refused(
    here: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not any(here.files.values())


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", CARD, "--org", "lab"]) == 1  # the server is gone
    assert "the Hugging Face Hub cannot be reached" in capsys.readouterr().err


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; give the model/ folder"):
        planned(str(tmp_path), "lab", None)


def test_a_trained_folder_is_pushed_under_the_name_of_its_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "p4_cnn7"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert planned(str(tmp_path), "lab", None) == (tmp_path, "lab/p4_cnn7", ["config.json", "model.safetensors"])
    assert planned(str(tmp_path), "lab", "cells")[1] == "lab/cells"
