"""Model cards: a folder per pretrained weight, laid out as its repository on the Hugging Face Hub.

`make_card` measures what a training run left behind and writes ``{name}.{tag}/`` with model.safetensors, config.json,
curves.png, results.json (every number) and README.md, which is rendered from results.json. `leaderboard` is the table
of all cards.
"""

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gzoo import bench
from gzoo.check import check
from gzoo.data import open_split
from gzoo.equivariant import group_of, like
from gzoo.evaluate import evaluate, precision
from gzoo.predict import load_model
from gzoo.weights import FILENAME, HUB_ORGANIZATION, card_folder, pins, write_atomically, write_pin

COSTS = "costs.json"  # beside the cards

# Points of test accuracy that kernels in half precision may cost; where they cost more, float32 is stored.
_HALF_LOSS = 0.02

# How a card names a data set: its title and its name on the Hub. As timm's, a tag ends with it: rotate_cifar10.
_DATASETS = {
    "rotmnist": ("rotated MNIST", "ylecun/mnist"),
    "cifar10": ("CIFAR-10 (JPEG)", "uoft-cs/cifar10"),
}

# What the Hub files a repository under.
_FOUND_BY = """pipeline_tag: image-classification
tags: [image-classification, timm, gzoo, equivariance]"""

UNNAMED = "OWNER/NAME"  # in the README of a trained model, until `gzoo push` knows where it goes


def make_card(run: str, data: str, folder: Path | None = None, bf16: bool = False) -> Path:
    """Measures the model of a finished training run on the test split and writes its card.

    Args:
        run: the ``out`` folder of `gzoo.train.train`.
        data: the data set, with a test split.
        folder: where the card folder is made; by default the model cards of this checkout.
        bf16: autocast to bfloat16, which large networks on a CPU need; the card then says so.

    Returns:
        The card's folder. Its kernels are in half precision unless that costs more than 0.02 points of test accuracy.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: no epoch was trained, its tag ends with no data set that has a title here, or ``data`` is another.
    """
    source = Path(run)
    if not (source / "results.json").is_file():
        raise FileNotFoundError(f"{run}/results.json: no such file; a card needs a finished run of `gzoo train`")
    training = json.loads((source / "results.json").read_text())
    config = json.loads((source / "model" / "config.json").read_text())
    runs = _runs(training)
    if not any(earlier["epochs"] for earlier in runs):
        raise ValueError(f"{run}: no epoch of it was trained; a card tells how weights were made")
    tag = config["pretrained_cfg"]["tag"]
    given = Path(data).resolve().name
    if given != Path(training["config"]["data"]).name:
        raise ValueError(f"{data}: the run was trained on {training['config']['data']}; give its test images as data")
    name = f"{config['architecture']}.{tag}"
    if _dataset(name) != given:
        raise ValueError(f"{data}: the run's tag {tag!r} says other data; a tag ends with the name of its own")
    model = load_model(run, pretrained=True).eval()
    size = tuple(model.pretrained_cfg["input_size"])  # type: ignore[index]
    images = open_split(data, "test")
    weights = (source / "model" / FILENAME).read_bytes()
    float32_top1 = evaluate(model, images, bf16=bf16)["top1"]
    for dtype in (torch.float16, torch.float32):
        stored = _with_kernels_in(dtype, weights, model)
        model.load_state_dict(safetensors.torch.load(stored))
        tested = evaluate(model, images, bf16=bf16, transforms=True, rotation_seed=0)
        if float32_top1 - tested["top1"] <= _HALF_LOSS + 1e-9:  # percent of whole images, as floats
            break
    results = {
        "name": name,
        "group": getattr(model, "group_name", None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": multiply_adds(model, size),
        "input_size": size,
        "test": tested,
        "test_dtype": precision(like(model).device, bf16),
        "kernel_dtype": str(dtype).removeprefix("torch."),
        "float32_top1": float32_top1,
        "equivariance_error": check(model, size[1:]).worst if group_of(model) else None,
        "training": training,
    }
    files = {
        FILENAME: stored,
        "config.json": (source / "model" / "config.json").read_bytes(),
        # an older run's results, kept in a card, may be without a log
        "curves.png": plot_curves([row for earlier in runs for row in earlier.get("log", ())]),
        "results.json": (json.dumps(results, indent=2) + "\n").encode(),
        "README.md": render(results).encode(),
    }
    target = (folder or card_folder()) / name
    target.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_atomically(target / file, content)
    write_pin(target)
    return target


def _dataset(name: str) -> str:
    """The data set of the weight of that name, a key of _DATASETS."""
    tag = name.rsplit(".", 1)[1]
    for dataset in _DATASETS:
        if tag == dataset or tag.endswith(f"_{dataset}"):
            return dataset
    raise ValueError(
        f"{name}: no title for data of the tag {tag!r}; a tag ends with one of {', '.join(_DATASETS)}. Cards are for "
        "the zoo's own weights; the model of a run of yours has one in its folder, which `gzoo push` uploads"
    )


def _with_kernels_in(dtype: torch.dtype, weights: bytes, model: nn.Module) -> bytes:
    """A file of safetensors with the kernels in ``dtype``. Norms, biases and buffers are few, and stay as they are."""
    kernels = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    tensors = safetensors.torch.load(weights)
    tensors = {key: value.to(dtype) if key in kernels else value for key, value in tensors.items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def multiply_adds(model: nn.Module, size: tuple[int, ...]) -> int:
    """Multiply-adds of one image of ``size`` (C, H, W): convolutions and linear layers, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    return counter.get_total_flops() // 2


def render(results: dict[str, Any]) -> str:
    """The README of a card, with the Hub's metadata, from its results."""
    name, test, training = results["name"], results["test"], results["training"]
    config = training["config"]
    architecture = name.rsplit(".", 1)[0]
    title, dataset = _DATASETS[_dataset(name)]
    error = f"{100 - test['top1']:.2f}"
    group = results["group"] or "none: a plain network, the baseline of its equivariant twins"
    exact = results["equivariance_error"]
    calibration = ""
    if "calibration_error" in test:  # not in the cards of older versions
        calibration = f"\n| calibration error (15 bins of confidence) | {test['calibration_error']:.2f}% |"
    kernels = ""
    if "kernel_dtype" in results:
        float32_error = f"{100 - results['float32_top1']:.2f}%"
        kernels = f"\n| kernels stored in | {results['kernel_dtype']}; trained in float32, {float32_error} test error |"
    turned = " ".join(f"{100 - top1:.2f}" for top1 in test["transforms"].values())
    runs = _runs(training)
    trained = [run for run in runs if run["epochs"]]
    start = "It went on from earlier weights of this name: " if config["pretrained"] else ""
    epochs = _epochs(trained[-1])
    if len(runs) > 1:
        start = "It went on from an earlier run: "
        epochs = ", then ".join(map(_epochs, trained))
    deeper = len({run["config"]["model"] for run in runs}) > 1
    if deeper or any("subgroup" in run["config"]["model_args"] for run in runs):
        start = "It grew from a smaller network (`gzoo.grow`): "
        epochs = ", ".join(
            _epochs(run)
            + (f" of {run['config']['model']}" if deeper else "")
            + (f" over {run['config']['model_args'].get('subgroup', results['group'])}" if results["group"] else "")
            for run in trained
        )
    commands = "\n".join(run["command"] for run in runs)
    times = ", then ".join(
        f"{seconds / 60:.0f} minutes on {machine['gpu'] or machine['cpu']}, {_threads(machine)}"
        for seconds, machine in _spans(runs)
    )
    validation = "the last epoch's weights, without validation"
    if config.get("averaged_with"):
        validation = "the mean of the last two runs' weights, without validation"
    if training["n_val"]:
        validation = f"{training['n_val']:,} more chose the weights of epoch {trained[-1]['best_epoch']}"
    return f"""---
library_name: timm
license: apache-2.0
{_FOUND_BY}
datasets: [{dataset}]
metrics: [accuracy]
model-index:
- name: {name}
  results:
  - task: {{type: image-classification}}
    dataset: {{name: "{title}", type: {dataset}, split: test}}
    metrics:
    - {{type: accuracy, value: {test["top1"]:.2f}}}
---

# {name}

```python
import timm, gzoo
model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

| | |
|---|---|
| group | {group} |
| parameters | {results["parameters"]:,} |
| multiply-adds of one image | {results["multiply_adds"]:,} |
| input | {" x ".join(map(str, results["input_size"]))} |
| test error, {title} | **{error}%** of {test["n"]:,} images, in {results["test_dtype"]} |
| test error under the eight symmetries of the square | {turned} (%) |
| test error, each image turned by a random angle | {100 - test["random_rotation"]:.2f}% |{calibration}
| equivariance error, float64 | {"not equivariant" if exact is None else f"{exact:.0e}"} |{kernels}

The eight symmetries are the rotations by 0, 90, 180 and 270 degrees, then the same after a reflection.

## How it was trained

```
{commands}
```

{start}{epochs} on {training["n_train"]:,} images of {title}; {validation}. Seed {config["seed"]}.
{times}, with torch
{training["torch"]} and timm {training["timm"]}. The recipe is `recipes/{name}.yaml`; all numbers are in results.json.

![loss and validation accuracy](curves.png)

## Limits

{architecture} knows {title} and nothing else; fine-tune it for other images. The figures are of one run.
The weights come with gzoo; this folder is laid out as the repository {HUB_ORGANIZATION}/{name} of the Hub.
"""


def render_trained(architecture: str, group: str | None, classes: list[str]) -> str:
    """The README of what `gzoo train` made, with the Hub's metadata; its owner adds licence, data and figures."""
    return f"""---
library_name: timm
{_FOUND_BY}
---

# {architecture}

```python
import timm, gzoo
model = timm.create_model("hf-hub:{UNNAMED}", pretrained=True).eval()    # where `gzoo push` uploaded it
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

Made with `gzoo train`. Group: {group or "none, a plain network"}. Classes: {", ".join(classes)}.
"""


def _runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the runs that a network was grown in, the smallest group first."""
    earlier = training.get("grown_from")
    return [*(_runs(earlier) if earlier else ()), training]


def plot_curves(rows: list[dict[str, Any]]) -> bytes:
    """Loss and accuracy over the epochs, the rows of log.csv, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    loss.plot(range(1, len(rows) + 1), [row["train_loss"] for row in rows], label="train")
    validated = [(epoch, row) for epoch, row in enumerate(rows, 1) if row["val_top1"] != ""]
    if validated:
        epochs = [epoch for epoch, _ in validated]
        loss.plot(epochs, [row["val_loss"] for _, row in validated], label="validation")
        top1.plot(epochs, [row["val_top1"] for _, row in validated])
    loss.set(xlabel="epoch", ylabel="loss")
    loss.legend()
    top1.set(xlabel="epoch", ylabel="validation top1 (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _epochs(run: dict[str, Any]) -> str:
    return f"{run['epochs']} epoch{'s' if run['epochs'] > 1 else ''}"


def _seconds(runs: list[dict[str, Any]]) -> float:
    return round(sum(run["seconds"] for run in runs), 1)


def _spans(runs: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Seconds and machine of each run that trained, those that follow each other on one machine as one."""
    spans = itertools.groupby((run for run in runs if run["epochs"]), lambda run: run["machine"])
    return [(_seconds(list(span)), machine) for machine, span in spans]


def _thread_count(machine: dict[str, Any]) -> int:
    return machine["threads"] * machine.get("processes", 1)


def _threads(machine: dict[str, Any]) -> str:
    count = _thread_count(machine)
    return f"{count} thread{'s' if count > 1 else ''}"


def _cards(folder: Path | None) -> list[dict[str, Any]]:
    """The results of all cards, sorted by data set, then test error; ``cost`` is speed and memory, if measured."""
    folder = folder or card_folder()
    cards = [json.loads(path.read_text()) for path in folder.glob("*/results.json")]
    measured = json.loads((folder / COSTS).read_text())["models"] if (folder / COSTS).is_file() else {}
    for card in cards:
        card["cost"] = measured.get(card["name"].rsplit(".", 1)[0], {})
    return sorted(cards, key=lambda card: (_dataset(card["name"]), 100 - card["test"]["top1"]))


def leaderboard(folder: Path | None = None) -> str:
    """One Markdown table over all cards, sorted by data set, then test error."""
    columns = (
        "weight, data, test error, turned and flipped, any angle, parameters, multiply-adds, images/s, memory, training"
    )
    lines = [f"| {columns.replace(',', ' |')} |", "|---" * len(columns.split(",")) + "|"]
    for card in _cards(folder):
        test, training, cost = card["test"], card["training"], card["cost"]
        earlier = " after earlier runs" if training["config"]["pretrained"] else ""
        cells = (
            f"`{card['name']}`",
            _DATASETS[_dataset(card["name"])][0],
            f"{100 - test['top1']:.2f}%",
            f"{100 - test['transforms_mean']:.2f}%",
            f"{100 - test['random_rotation']:.2f}%",
            f"{card['parameters'] / 1e6:.3f}M",
            f"{card['multiply_adds'] / 1e6:.0f}M",
            f"{cost['images_per_second']:.0f}" if cost else "-",
            f"{cost['training_memory_mb']:.0f} MB" if cost.get("training_memory_mb") else "-",
            " + ".join(
                f"{seconds / 60:.0f} min{earlier}, {machine['gpu'] or 'CPU, ' + _threads(machine)}"
                for seconds, machine in _spans(_runs(training))
            ),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def results_csv(folder: Path | None = None) -> str:
    """The table of all cards for programs: accuracies and calibration error in percent, "" where not measured."""
    rows = []
    for card in _cards(folder):
        test, training = card["test"], card["training"]
        machine, cost = training["machine"], card["cost"]
        rows.append(
            {
                "name": card["name"],
                "data": _dataset(card["name"]),
                **{key: test[key] for key in ("top1", "transforms_mean", "random_rotation")},
                "calibration_error": test.get("calibration_error", ""),
                "parameters": card["parameters"],
                "multiply_adds": card["multiply_adds"],
                **{key: cost.get(key, "") for key in ("images_per_second", "training_memory_mb")},
                "training_seconds": _seconds(_runs(training)),
                "training_machine": machine["gpu"] or machine["cpu"],
                "training_threads": _thread_count(machine),
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def update_tables(measure: bool = False) -> str:
    """Writes what lies beside the cards, results.csv and pins.csv, anew from them; returns the README's table.

    Args:
        measure: also writes costs.json anew: speed and memory of all models with a card, on this machine.
    """
    folder = card_folder()
    if measure:
        names = dict.fromkeys(card["name"].rsplit(".", 1)[0] for card in _cards(folder))
        (folder / COSTS).write_text(json.dumps(bench.costs(list(names)), indent=2) + "\n")
    (folder / "results.csv").write_text(results_csv())
    pinned = pins(folder)
    for path in folder.glob("*/results.json"):
        if path.parent.name not in pinned:  # a file that changed since shall not pass for the one that was measured
            write_pin(path.parent)
    return leaderboard()
