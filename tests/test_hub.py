"""Publishing and loading through the real client of the Hub, against a server on this machine."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import gzoo
from gzoo.cli import main
from gzoo.hub import planned
from gzoo.predict import load_model
from gzoo.train import TrainConfig, train
from gzoo.weights import card_folder, pins, write_pin
from tests import fresh
from tests.hub_server import TOKEN, Hub, hub

CARD = "p4_cnn7.rotmnist"


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as running:
        yield running


@pytest.fixture
def here(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, as the Hub of this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def run(server: Hub, home: Path, code: str, token: str = TOKEN, **more: str) -> subprocess.CompletedProcess[str]:
    """Python in another process, whose Hub is ``server`` and whose cache is ``home``."""
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return fresh.run(code, **environment | more)


def push(server: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(server, home, fresh.command("push", *arguments))


def load(server: Hub, home: Path, *names: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    code = (
        "import timm, gzoo, torch; "
        f"b, *others = (timm.create_model(n, pretrained=True).eval() for n in {(CARD, *names)!r}); "
        "x = torch.rand(2, 1, 28, 28); [print(a.group_name, torch.equal(a(x), b(x))) for a in others]"
    )
    return run(server, home, code, token=token)


def test_a_pushed_card_loads_in_another_process(server: Hub, tmp_path: Path) -> None:
    pushed = push(server, tmp_path / "writer", CARD, "--org", "lab")
    assert pushed.returncode == 0, pushed.stderr
    assert f"{server.url}/lab/{CARD}/commit/{server.commits[f'lab/{CARD}']}" in pushed.stdout
    folder = card_folder() / CARD
    assert server.files[f"lab/{CARD}"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    names = f"hf-hub:lab/{CARD}", f"hf-hub:lab/{CARD}@{server.commits[f'lab/{CARD}']}"
    loaded = load(server, tmp_path / "reader", *names, token="")
    assert loaded.stdout == 2 * "p4 True\n", loaded.stderr
    again = push(server, tmp_path / "writer", CARD, "--org", "lab")  # the repository exists
    assert again.returncode == 0, again.stderr


def test_a_private_repository_loads_with_a_token_only(here: Hub, tmp_path: Path) -> None:
    assert main(["push", CARD, "--org", "lab", "--private"]) == 0
    assert load(here, tmp_path / "owner", f"hf-hub:lab/{CARD}").stdout == "p4 True\n"
    stranger = load(here, tmp_path / "stranger", f"hf-hub:lab/{CARD}", token="")
    assert stranger.returncode == 1
    assert "401 Unauthorized" in stranger.stderr


def test_a_busy_hub_is_asked_again(server: Hub, tmp_path: Path) -> None:
    server.commit(f"lab/{CARD}", {path.name: path.read_bytes() for path in (card_folder() / CARD).iterdir()})
    server.failures += [("resolve/main/config.json", 429), ("cdn/", "drop")]
    loaded = load(server, tmp_path, f"hf-hub:lab/{CARD}", token="")
    assert loaded.stdout == "p4 True\n", loaded.stderr
    assert not server.failures


def test_a_card_of_the_zoo_is_pinned_to_the_commit_that_push_made(
    here: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards = tmp_path / "model_cards"
    shutil.copytree(card_folder(), cards)
    monkeypatch.setattr("gzoo.weights._CARD_FOLDERS", (cards,))
    before = pins()
    assert main(["push", CARD, "--org", "lab"]) == 0
    assert pins() == before
    assert main(["push", CARD]) == 0
    assert pins() == before | {CARD: before[CARD]._replace(revision=here.commits[f"gzoo/{CARD}"])}
    (cards / CARD / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no README\.md; .* make the card anew"):
        planned(CARD, "lab", None)


@pytest.fixture
def stripped(server: Hub, tmp_path: Path) -> Path:
    """The folder of a gzoo without its weights, which are on the Hub, under a pinned commit."""
    (tmp_path / "gzoo").symlink_to(Path(gzoo.__file__).parent)
    card = tmp_path / "model_cards" / CARD
    shutil.copytree(card_folder() / CARD, card)
    files = {path.name: path.read_bytes() for path in card.iterdir()}
    write_pin(card, server.commit(f"gzoo/{CARD}", files))
    (card / "model.safetensors").unlink()
    return tmp_path


def pretrained(server: Hub, folder: Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Whether p4_cnn7 of the gzoo in ``folder`` has the bundled weights."""
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import timm, gzoo, torch; "
        "from safetensors.torch import load_file; "
        "own = timm.create_model('p4_cnn7', pretrained=True).state_dict(); "
        f"bundled = load_file({str(card_folder() / CARD / 'model.safetensors')!r}); "
        f"assert gzoo.__file__.startswith({str(folder)!r}); "
        "print(all(torch.equal(own[key], bundled[key]) for key in bundled if key != 'group_signature'))"
    )
    return run(server, home, code, token="", **more)


def test_weights_that_are_not_bundled_are_downloaded_by_pinned_revision(
    server: Hub, stripped: Path, tmp_path: Path
) -> None:
    offline = pretrained(server, stripped, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert f"gzoo/{CARD}@{server.commits[f'gzoo/{CARD}']}: the Hugging Face Hub cannot be reached" in offline.stderr
    assert not server.requests
    loaded = pretrained(server, stripped, tmp_path / "home")
    assert loaded.stdout == "True\n", loaded.stderr
    assert f"HEAD /gzoo/{CARD}/resolve/{server.commits[f'gzoo/{CARD}']}/model.safetensors" in server.requests
    assert not any("/main/" in request for request in server.requests)
    server.requests.clear()
    assert pretrained(server, stripped, tmp_path / "home", HF_HUB_OFFLINE="1").stdout == "True\n"
    assert not server.requests


def test_a_download_with_another_hash_is_refused_until_the_file_is_deleted(
    server: Hub, stripped: Path, tmp_path: Path
) -> None:
    files = server.files[f"gzoo/{CARD}"]
    right = files["model.safetensors"]
    files["model.safetensors"] = right[:-1] + bytes([right[-1] ^ 1])
    found, expected = (hashlib.sha256(content).hexdigest() for content in (files["model.safetensors"], right))
    refused = pretrained(server, stripped, tmp_path / "home")
    assert refused.returncode == 1
    said = re.search(
        r"ValueError: (\S+) is not the file of (\S+) that .* is (\w+), not (\w+)\. Delete it", refused.stderr
    )
    assert said is not None, refused.stderr
    assert said.groups()[1:] == (CARD, found, expected)
    files["model.safetensors"] = right
    assert pretrained(server, stripped, tmp_path / "home").returncode == 1  # the cache has the wrong one still
    Path(said[1]).unlink()
    assert pretrained(server, stripped, tmp_path / "home").stdout == "True\n"


def test_a_revision_that_the_hub_lacks_is_named(server: Hub, stripped: Path, tmp_path: Path) -> None:
    server.commits[f"gzoo/{CARD}"] = "0" * 40
    lost = pretrained(server, stripped, tmp_path / "home")
    assert "there is no such repository or revision on the Hugging Face Hub" in lost.stderr


def test_a_trained_model_is_pushed_and_loads_in_another_process(server: Hub, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    out = tmp_path / "out"
    train(TrainConfig("p4_cnn7", str(tmp_path / "pets"), str(out), epochs=1, batch_size=4, val_fraction=0.0))
    pushed = push(server, tmp_path / "writer", str(out / "model"), "--org", "lab", "--name", "pets")
    assert pushed.returncode == 0, pushed.stderr
    readme = server.files["lab/pets"]["README.md"].decode()
    metadata = yaml.safe_load(readme.split("---\n")[1])
    assert metadata["library_name"] == "timm"
    assert "gzoo" in metadata["tags"]
    assert "Group: p4. Classes: cat, dog." in readme
    assert 'timm.create_model("hf-hub:lab/pets", pretrained=True)' in readme
    assert "hf-hub:OWNER/NAME" in (out / "model" / "README.md").read_text()
    x = torch.rand(2, 1, 28, 28)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import timm, gzoo, torch; model = timm.create_model('hf-hub:lab/pets', pretrained=True).eval(); "
        f"torch.save(model(torch.load({str(tmp_path / 'x.pt')!r})), {str(tmp_path / 'y.pt')!r})"
    )
    loaded = run(server, tmp_path / "reader", code, token="")
    assert loaded.returncode == 0, loaded.stderr
    assert torch.load(tmp_path / "y.pt").equal(load_model(str(out), pretrained=True).eval()(x))


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
        ((CARD, "--name", "a b", "--dry-run"), TOKEN, "a b is no name of a repository"),
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


def test_a_run_is_pushed_by_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    for name, text in (("config.json", '{"architecture": "p4_cnn7"}'), ("model.safetensors", "")):
        (tmp_path / "model" / name).write_text(text)
    folder, repository, files = planned(str(tmp_path), "lab", None)
    assert (folder, repository) == ((tmp_path / "model").resolve(), "lab/p4_cnn7")
    assert files == ["config.json", "model.safetensors"]
    (tmp_path / "checkpoint.pt").touch()
    for finished in (False, True):
        planned(str(tmp_path), "lab")
        assert ("this run has not finished" in capsys.readouterr().err) == (not finished)
        (tmp_path / "results.json").touch()


def test_a_trained_folder_is_pushed_under_the_name_of_its_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "p4_cnn7"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert planned(str(tmp_path), "lab", None) == (tmp_path, "lab/p4_cnn7", ["config.json", "model.safetensors"])
    assert planned(str(tmp_path), "lab", "cells")[1] == "lab/cells"


def test_a_path_is_a_path_first_and_that_of_a_card_is_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(card_folder() / CARD)
    assert planned(".", "lab") == planned(CARD, "lab")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json names no architecture"):
        planned(".", "lab")
