"""The README's Python runs as printed, and its tables are those of the result files."""

import csv
import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest

from gzoo import coverage, mnist6
from gzoo.bench import table
from gzoo.card import leaderboard

README = Path(__file__).parent.parent / "README.md"
BENCHMARKS = README.parent / "benchmarks"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet {i}" for i in range(len(SNIPPETS))])
def test_readme_snippets_print_what_they_say(snippet, capsys):
    said = re.findall(r"print\(.*# (True|False)", snippet)
    exec(snippet, {})
    assert capsys.readouterr().out.split() == said


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 2


def test_readme_shows_the_leaderboard_of_the_cards():
    shown = re.search(r"<!-- leaderboard -->\n(.*?)\n<!-- /leaderboard -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == leaderboard()


def neu_surface_row(name):
    """A row of the README's fine-tuning table, from what `gzoo train` and `gzoo eval` wrote."""
    tested = json.loads((BENCHMARKS / f"{name}.neu_surface.eval.json").read_text())
    training = json.loads((BENCHMARKS / f"{name}.neu_surface.training.json").read_text())
    return (
        f"| `{name}` | {tested['top1']:.1f}% | {tested['transforms_mean']:.1f}% "
        f"| {min(tested['transforms'].values()):.1f}% | {training['seconds'] / 60:.0f} min |"
    )


@pytest.mark.parametrize("name", ["resnet20", "p4m_resnet20"])
def test_readme_shows_the_fine_tuning_runs_as_measured(name):
    assert neu_surface_row(name) in README.read_text().splitlines()


@pytest.mark.parametrize("name", ["bench", "bench_winograd"])
def test_readme_shows_the_bench_as_measured(name):
    shown = re.search(rf"<!-- {name} -->\n```\n(.*?)\n```\n<!-- /{name} -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == table(json.loads((BENCHMARKS / f"{name}.json").read_text())).strip()


@pytest.mark.parametrize("name", ["mnist6", "mnist6 continuous"])
def test_readme_shows_the_partial_networks_as_measured(name):
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == mnist6.table(json.loads((BENCHMARKS / f"{name.replace(' ', '_')}.json").read_text()))


@pytest.mark.parametrize(("place", "name"), [("four ways", "four_ways"), ("canonicalize", "canonicalize_rotmnist")])
def test_readme_shows_the_ways_as_measured(place, name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # the script imports the one beside it
    table = runpy.run_path(str(BENCHMARKS / f"{name}.py"))["table"]
    shown = re.search(rf"<!-- {place} -->\n(.*?)\n<!-- /{place} -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == table(json.loads((BENCHMARKS / f"{name}.json").read_text()))


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("continuous_*.json")), ids=lambda path: path.stem)
def test_readme_shows_the_continuous_groups_as_measured(path):
    table = runpy.run_path(str(BENCHMARKS / "continuous.py"))["table"]
    shown = re.search(rf"<!-- {path.stem} -->\n(.*?)\n<!-- /{path.stem} -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == table(json.loads(path.read_text())["runs"])


def test_readme_shows_what_pretrained_weights_are_worth(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # the script imports the one beside it
    script = runpy.run_path(str(BENCHMARKS / "fine_tune.py"))
    shown = re.search(r"<!-- fine-tuning -->\n(.*?)\n<!-- /fine-tuning -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == script["table"](script["read"](BENCHMARKS / "fine_tune.csv"))


def test_readme_shows_the_pose_experiment_as_measured():
    found = json.loads((BENCHMARKS / "pose_mnist.json").read_text())
    both, digit, turn = (found["pose"][key] for key in ("both_right", "digit_right", "turn_right"))
    assert f"both right for {both}% (digit {digit}%, rotation {turn}%)" in README.read_text()
    assert f"is invariant: {found['angle_dropped']['rotated']}% of the digits" in README.read_text()
    figure4 = found["figure4"]
    for turns, rows in enumerate(figure4["probabilities"]):
        cells = [*rows[figure4["digit"]], figure4["angle_dropped"][turns][figure4["digit"]]]
        assert f"| {90 * turns} | {' | '.join(f'{p:.2e}' for p in cells)} |" in README.read_text().splitlines()


def test_readme_shows_the_coverage_as_measured():
    shown = re.search(r"<!-- coverage -->\n```\n(.*?)\n```\n<!-- /coverage -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == coverage.table(coverage.read(BENCHMARKS / "coverage.csv"))


def test_readme_shows_the_turns_between_pixels_as_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # the script imports the one beside it
    script = runpy.run_path(str(BENCHMARKS / "turns.py"))
    table = script["table"](script["read"](BENCHMARKS / "turns.csv"))
    assert f"<!-- turns -->\n{table}\n<!-- /turns -->" in README.read_text()


def test_readme_shows_how_exact_the_zoo_is(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # the script imports the one beside it
    script = runpy.run_path(str(BENCHMARKS / "zoo.py"))
    rows, models = script["read"](BENCHMARKS / "zoo.csv"), script["names"]()
    assert {row["model"] for row in rows} <= set(models)
    worst = {dtype: max(float(row[dtype]) for row in rows) for dtype in ("float64", "float32")}
    said = f"{len(rows)} of its {len(models)} models: at most {worst['float64']:.0e} in float64"
    said += f" and {worst['float32']:.0e} in float32"
    assert said in " ".join(README.read_text().split())


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("low_data_*.csv")), ids=lambda path: path.stem)
def test_readme_shows_the_errors_with_few_images(path):
    spec = importlib.util.spec_from_file_location("low_data", BENCHMARKS / "low_data.py")
    assert spec is not None
    low_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(low_data)
    rows = low_data.read(path)
    shown = re.search(rf"<!-- {path.stem} -->\n(.*?)\n<!-- /{path.stem} -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == low_data.table(rows)


def test_readme_shows_the_networks_of_other_libraries_as_measured():
    script = runpy.run_path(str(BENCHMARKS / "libraries.py"))
    with (BENCHMARKS / "libraries.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = re.search(r"<!-- libraries -->\n(.*?)\n<!-- /libraries -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == script["table"](rows)
    assert len(rows) == len(script["NETWORKS"])
