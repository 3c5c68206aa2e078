"""Model cards: made from a run, and in step with registry, recipe and weights."""

import csv
import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from gzoo import card, registry
from gzoo.check import check
from gzoo.cli import main
from gzoo.equivariant import SIGNATURE
from gzoo.train import TrainConfig, train
from gzoo.weights import card_folder, pins

CARDS = sorted(path.parent for path in card_folder().glob("*/config.json"))
ONE_RUN = card_folder() / "c8_cnn7.rotmnist"
TAGGED = [f"{entry.name}.{tag}" for entry in registry.ENTRIES for tag in entry.weights]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one epoch on a few random digits."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("0", "1"):
            (folder / "rotmnist" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "rotmnist" / split / name / f"{i}.png")
    config = TrainConfig(
        "p4_cnn7", str(folder / "rotmnist"), str(folder / "out"), epochs=1, batch_size=4, val_fraction=0.0
    )
    train(config, command="gzoo train ...")
    return folder


def test_a_card_is_made_from_a_finished_run(run, tmp_path):
    made = card.make_card(str(run / "out"), str(run / "rotmnist"), tmp_path)
    assert made.name == "p4_cnn7.rotmnist"
    written = {path.name for path in made.iterdir()}
    assert written == {"README.md", "config.json", "curves.png", "model.safetensors", "results.json"}
    assert list(pins(tmp_path)) == [made.name]
    results = json.loads((made / "results.json").read_text())
    assert results["test"]["n"] == 8
    assert results["equivariance_error"] < 1e-12
    assert f"{100 - results['test']['top1']:.2f}%" in (made / "README.md").read_text()
    assert "`p4_cnn7.rotmnist`" in card.leaderboard(tmp_path)


def test_a_card_has_kernels_in_half_precision_and_measures_those(run, tmp_path, monkeypatch):
    measured = []

    def evaluate(model, *args, **kwargs):
        measured.append({key: value.clone() for key, value in model.state_dict().items()})
        return evaluated(model, *args, **kwargs)

    evaluated = card.evaluate
    monkeypatch.setattr(card, "evaluate", evaluate)
    made = card.make_card(str(run / "out"), str(run / "rotmnist"), tmp_path)
    trained, stored = load_file(run / "out" / "model" / "model.safetensors"), load_file(made / "model.safetensors")
    assert {key for key in stored if stored[key].dtype == torch.float16} == {
        key for key in stored if key.endswith("weight") and stored[key].ndim > 1
    }
    assert all(torch.equal(stored[key], trained[key].to(stored[key])) for key in stored)
    before, after = measured
    assert all(torch.equal(before[key], trained[key]) for key in stored if key != SIGNATURE)
    assert all(torch.equal(after[key], stored[key].to(after[key])) for key in stored if key != SIGNATURE)
    assert "kernels stored in | float16; trained in float32, " in (made / "README.md").read_text()


def test_a_card_keeps_float32_where_half_precision_costs_accuracy(run, tmp_path, monkeypatch):
    measured = iter((90.0, 89.9, 90.0))
    evaluated = card.evaluate
    monkeypatch.setattr(card, "evaluate", lambda *a, **kw: evaluated(*a, **kw) | {"top1": next(measured)})
    made = card.make_card(str(run / "out"), str(run / "rotmnist"), tmp_path)
    trained, stored = load_file(run / "out" / "model" / "model.safetensors"), load_file(made / "model.safetensors")
    assert all(torch.equal(stored[key], trained[key]) and stored[key].dtype == trained[key].dtype for key in trained)
    assert json.loads((made / "results.json").read_text())["test"]["top1"] == 90.0


def test_a_card_is_made_from_a_network_that_grew_and_was_not_trained_since(run, tmp_path):
    config = TrainConfig(
        "p4_cnn7",
        str(run / "rotmnist"),
        str(tmp_path / "c2"),
        {"subgroup": "c2"},
        epochs=1,
        batch_size=4,
        val_fraction=0,
    )
    train(config, command="over c2")
    train(replace(config, out=str(tmp_path / "p4"), model_args={}, grown_from=config.out, epochs=0), command="over p4")
    made = card.make_card(str(tmp_path / "p4"), str(run / "rotmnist"), tmp_path / "cards")
    assert "(`gzoo.grow`): 1 epoch over c2 on" in (made / "README.md").read_text()
    assert (made / "curves.png").read_bytes() == (tmp_path / "c2" / "curves.png").read_bytes()


def test_a_recipe_may_name_its_weights_by_more_than_their_data(run, tmp_path):
    config = TrainConfig(
        "p4_cnn7", str(run / "rotmnist"), str(tmp_path / "run"), tag="rotate_rotmnist", epochs=1, val_fraction=0
    )
    train(config, command="with a tag")
    made = card.make_card(config.out, config.data, tmp_path / "cards")
    assert made.name == "p4_cnn7.rotate_rotmnist"
    assert "rotated MNIST" in (made / "README.md").read_text()
    assert "| `p4_cnn7.rotate_rotmnist` | rotated MNIST |" in card.leaderboard(tmp_path / "cards")
    other = replace(config, out=str(tmp_path / "other"), tag="digits")
    train(other, command="with a tag that names no data")
    with pytest.raises(ValueError, match="no title for data of the tag 'digits'; a tag ends with one of rotmnist"):
        card.make_card(other.out, other.data, tmp_path / "cards")
    wrong = replace(config, out=str(tmp_path / "wrong"), tag="cifar10")
    train(wrong, command="with the tag of other data")
    with pytest.raises(ValueError, match="the run's tag 'cifar10' says other data"):
        card.make_card(wrong.out, wrong.data, tmp_path / "cards")


def test_an_unfinished_run_gets_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs a finished run"):
        card.make_card(str(tmp_path), "data")


def test_multiply_adds_are_those_of_the_expanded_network():
    model = timm.create_model("p4_cnn7")
    expected, size = 28 * 28 * 0, 28
    for kernel, inputs in ((3, 1), (3, 40), (3, 40), (3, 40), (3, 40), (3, 40), (4, 40)):
        size -= kernel - 1
        expected += size * size * kernel * kernel * inputs * 40
        size = size // 2 if size == 24 else size
    assert card.multiply_adds(model, (1, 28, 28)) == expected + 10 * 10


@pytest.mark.parametrize("name", TAGGED)
def test_every_tag_of_the_registry_has_a_card_and_a_recipe(name):
    assert (card_folder() / name / "model.safetensors").is_file()
    assert (card_folder().parent / "recipes" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_card_registry_recipe_and_weights_agree(folder):
    assert folder.name in TAGGED
    results = json.loads((folder / "results.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "README.md").read_text() == card.render(results)
    assert f"{config['architecture']}.{config['pretrained_cfg']['tag']}" == folder.name == results["name"]
    recipe = yaml.safe_load((card_folder().parent / "recipes" / f"{folder.name}.yaml").read_text())
    trained = results["training"]["config"]
    assert {key: trained[key] for key in recipe} == recipe
    assert results["parameters"] == sum(p.numel() for p in timm.create_model(config["architecture"]).parameters())
    loaded = timm.create_model(folder.name, pretrained=True).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded[key], stored[key].to(loaded[key])) for key in stored if key != SIGNATURE)
    assert pins()[folder.name].sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [f"{e.name}.{tag}" for e in registry.ENTRIES if e.group for tag in e.weights])
def test_trained_weights_are_equivariant(name):
    model = timm.create_model(name, pretrained=True)
    sizes = ((28, 28), (31, 32)) if name.endswith("rotmnist") else ((17, 20), (24, 24))
    for size, dtype, bar in zip(sizes, (torch.float64, torch.float32), (1e-12, 1e-5), strict=True):
        assert check(model, size, dtype=dtype).worst <= bar


def test_every_pin_is_of_a_weight_in_the_registry():
    assert set(pins()) == set(TAGGED)


def test_results_csv_is_that_of_the_cards():
    text = (card_folder() / "results.csv").read_text()
    assert text == card.results_csv()
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(text))}
    assert set(rows) == set(TAGGED)
    for name, row in rows.items():
        results = json.loads((card_folder() / name / "results.json").read_text())
        assert float(row["top1"]) == results["test"]["top1"]
        assert int(row["multiply_adds"]) == results["multiply_adds"]
        seconds, run = 0.0, results["training"]
        while run:
            seconds, run = seconds + run["seconds"], run.get("grown_from")
        assert float(row["training_seconds"]) == pytest.approx(seconds)


def test_a_card_without_a_calibration_error_still_renders():
    results = json.loads((ONE_RUN / "results.json").read_text())
    results["test"] |= {"calibration_error": 1.234}
    assert "| calibration error (15 bins of confidence) | 1.23% |\n" in card.render(results)
    del results["test"]["calibration_error"]
    assert "calibration" not in card.render(results)


def test_a_card_says_that_training_went_on_and_how_many_threads_it_had():
    results = json.loads((ONE_RUN / "results.json").read_text())
    results["training"]["config"]["pretrained"] = True
    results["training"]["machine"] |= {"threads": 2, "processes": 3, "gpu": None}
    text = card.render(results)
    assert f"It went on from earlier weights of this name: {results['training']['epochs']} epochs" in text
    assert ", 6 threads, with torch" in text


def test_a_card_tells_all_runs_that_a_network_was_grown_in():
    results = json.loads((ONE_RUN / "results.json").read_text())
    last = results["training"] | {"seconds": 600, "epochs": 3}
    results["training"] = {"grown_from": {}} | last
    for subgroup in ("c1", "p4"):
        config = last["config"] | {"model": "shallower", "model_args": {"subgroup": subgroup}}
        earlier = last | {"config": config, "command": f"over {subgroup}", "seconds": 60, "epochs": 5}
        results["training"]["grown_from"] = earlier | {"grown_from": results["training"]["grown_from"]}
    text = card.render(results)
    assert f"```\nover c1\nover p4\n{last['command']}\n```" in text
    model, group = last["config"]["model"], results["group"]
    assert "(`gzoo.grow`): 5 epochs of shallower over c1, 5 epochs of shallower over p4, " in text
    assert f"over p4, 3 epochs of {model} over {group} on" in text
    assert "\n12 minutes on " in text
    plain = card.render(results | {"group": None})
    assert f"5 epochs of shallower, 5 epochs of shallower, 3 epochs of {model} on" in plain


def test_a_card_tells_where_each_run_was_made_that_the_last_went_on_from(tmp_path):
    results = json.loads((ONE_RUN / "results.json").read_text())
    last, machine = results["training"], {"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None, "processes": 1}
    first = last | {"machine": machine, "seconds": 60, "epochs": 5, "command": "the first", "grown_from": {}}
    results["training"] = last | {
        "machine": machine | {"processes": 2},
        "seconds": 120,
        "epochs": 3,
        "grown_from": first,
    }
    text = card.render(results)
    assert "It went on from an earlier run: 5 epochs, then 3 epochs on" in text
    assert "\n1 minutes on A CPU, 1 thread, then 2 minutes on A CPU, 2 threads, with torch" in text
    (tmp_path / ONE_RUN.name).mkdir()
    (tmp_path / ONE_RUN.name / "results.json").write_text(json.dumps(results))
    assert "| 1 min, CPU, 1 thread + 2 min, CPU, 2 threads |" in card.leaderboard(tmp_path)


def test_the_tables_are_written_from_the_cards(tmp_path, monkeypatch, capsys):
    cards = tmp_path / "model_cards"
    shutil.copytree(card_folder(), cards)
    monkeypatch.setattr("gzoo.weights._CARD_FOLDERS", (cards,))
    written = {name: (cards / name).read_bytes() for name in ("results.csv", "pins.csv")}
    for name in written:
        (cards / name).unlink()
    assert main(["leaderboard"]) == 0
    assert capsys.readouterr().out.strip() == card.leaderboard()
    assert (cards / "results.csv").read_bytes() == written["results.csv"]
    assert pins().keys() == set(TAGGED)


def test_speed_and_memory_are_measured_when_asked(tmp_path, monkeypatch, capsys):
    cards = tmp_path / "model_cards"
    shutil.copytree(card_folder(), cards)
    monkeypatch.setattr("gzoo.weights._CARD_FOLDERS", (cards,))
    monkeypatch.setattr(
        "gzoo.bench.costs",
        lambda names: {"models": {name: {"images_per_second": 7.4, "training_memory_mb": None} for name in names}},
    )
    assert main(["leaderboard", "--measure"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(rows) == len(CARDS)
    assert all("| 7 | - |" in row for row in rows)
    assert (cards / "results.csv").read_text().count(",7.4,,") == len(CARDS)


def test_bundled_weights_stay_small():
    assert sum(path.stat().st_size for path in card_folder().glob("*/model.safetensors")) <= 40e6


def test_the_card_folder_lies_beside_or_inside_the_package():
    assert card_folder().parent in (Path(card.__file__).parent, Path(card.__file__).parent.parent)
