"""Recipes, training, resuming, and what a run leaves behind when it ends well or badly."""

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import gzoo.train
from gzoo.data import open_split
from gzoo.evaluate import evaluate
from gzoo.predict import load_model
from gzoo.train import TrainConfig, make_config, merge, read_recipe, resume_config, train
from gzoo.weights import write_atomically
from tests import fresh


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that can be told apart: dark and bright noise, 12 images each."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low in (("bright", 120), ("dark", 0)):
        (folder / name).mkdir()
        for i in range(12):
            Image.fromarray(rng.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def settings(images, tmp_path):
    return {
        "model": "test_resnet",
        "data": str(images),
        "out": str(tmp_path / "run"),
        "epochs": 2,
        "batch_size": 8,
        "image_size": 32,
        "val_fraction": 0.25,
    }


def weights(out):
    return safetensors.torch.load_file(Path(out) / "model" / "model.safetensors")


def state(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def log(out):
    """The rows of log.csv without what the clock decides."""
    with open(Path(out) / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in rows]


def same(a, b):
    """Nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_curve(a, b):
    """Two logs agree but for the order of float32 sums, and the loss moved."""
    assert len(a) == len(b)
    for key in ("train_loss", "val_loss", "val_top1"):
        assert [float(row[key]) for row in a] == pytest.approx([float(row[key]) for row in b], rel=1e-4)
    assert len({row["train_loss"] for row in a}) == len(a) > 1


class Stop(Exception):
    """Ends a run from inside, as a power cut would."""


def stop_after(monkeypatch, epochs):
    """Let the next run fail when it begins the epoch after `epochs`."""
    real = gzoo.train._train_one_epoch

    def one_epoch(run, *args):
        if run.epoch == epochs:
            raise Stop
        return real(run, *args)

    monkeypatch.setattr(gzoo.train, "_train_one_epoch", one_epoch)


# --- the recipe


def test_a_recipe_becomes_a_config(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: d\nout: o\noptimizer: {name: sgd, lr: 1.0e-2}\nimage_sizes: [[1, 24], [2, 32]]\n")
    config = make_config(read_recipe(str(path)))
    assert config.optimizer == {"name": "sgd", "lr": 0.01}
    assert config.image_sizes == ((1, 24), (2, 32))


def test_a_misspelt_key_is_an_error_that_names_the_nearest(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nlabel_smothing: 0.1\n")
    with pytest.raises(ValueError, match=r"'label_smothing' is no entry of a recipe; the nearest is 'label_smoothing'"):
        read_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(("text", "message"), [("- a\n", "list of `key: value`"), ("a: [", "not readable as YAML")])
def test_a_file_that_is_no_recipe_is_an_error(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_recipe_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_config_without_model_data_or_out_is_an_error():
    with pytest.raises(ValueError, match="data and out missing; give --data, --out"):
        make_config({"model": "m"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"epochs": "ten"}, "epochs is 'ten'; it takes int"),
        ({"epochs": -1}, "epochs is -1; it must be at least 0"),
        ({"hflip": True}, "hflip is True; it takes float"),
        ({"label_smoothing": "1e-1"}, "the text '1e-1', not a number: YAML reads 1e-4 as text"),
        ({"optimizer": {"name": "sgd", "lr": "5e-2"}}, "optimizer.lr is the text '5e-2'"),
        ({"optimizer": {"lr": 0.1}}, "it needs a name"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; it must be below 1"),
        ({"hflip": 7.0}, "hflip is 7.0; it must be at most 1"),
        ({"clip_grad": 0.0}, "clip_grad is 0.0; it must be above 0"),
        ({"scale": [0.0, 1.0]}, "scale is (0.0, 1.0); it must be above 0"),
        ({"model_args": {"num_classes": 5}}, "model_args has num_classes; the classes follow from the data"),
        ({"scale": [0.1, 0.5, 1.0]}, "scale is"),
        ({"winograd": True, "bf16": True}, "winograd is for float32 and networks that are not compiled"),
        ({"tag": "cifar10.first"}, "it takes letters, digits and underscores"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_an_error_that_says_what_it_takes(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(model="m", data="d", out="o", **entry)


def test_flags_override_a_recipe_and_change_single_keys_of_its_mappings():
    recipe = {"epochs": 5, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
    merged = merge(recipe, {"epochs": 7, "optimizer": {"lr": 0.2}, "schedule": {"warmup_epochs": 1}})
    assert merged["epochs"] == 7
    assert merged["optimizer"] == {"name": "sgd", "lr": 0.2, "momentum": 0.9}
    assert merged["schedule"] == {"name": "cosine", "warmup_epochs": 1}
    with pytest.raises(ValueError, match="optimizer is 'sgd'; it takes dict"):
        TrainConfig("m", "d", "o", **merge({"optimizer": "sgd"}, {"optimizer": {"lr": 0.2}}))


# --- a whole run


def test_training_learns_and_leaves_a_model_that_timm_loads_with_its_class_names(settings):
    results = train(TrainConfig(**settings | {"epochs": 3}), command="gzoo train ...")
    out = Path(settings["out"])
    assert results["best_val_top1"] == 100
    assert results == json.loads((out / "results.json").read_text()) | {"config": results["config"]}
    assert (results["n_train"], results["n_val"], results["command"]) == (18, 6, "gzoo train ...")
    assert [row["epoch"] for row in log(out)] == ["1", "2", "3"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.tmp"))

    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    assert (model.num_classes, model.pretrained_cfg["label_names"]) == (2, ["bright", "dark"])
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert same(dict(model.state_dict()), weights(out))


def test_the_model_folder_rebuilds_the_model_with_its_arguments_and_data_config(settings):
    changes = {"model_args": {"in_chans": 1, "drop_rate": 0.1}, "mean": [0.4], "std": [0.3], "crop_pct": 1.0}
    train(TrainConfig(**settings | changes | {"epochs": 1}))
    config = json.loads((Path(settings["out"]) / "model/config.json").read_text())
    assert "drop_rate" not in config["model_args"]
    model = timm.create_model(f"local-dir:{settings['out']}/model", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["mean"], data["std"], data["crop_pct"]) == ((1, 32, 32), [0.4], [0.3], 1.0)


def test_an_equivariant_model_is_saved_with_its_group(settings):
    changes = {"model": "p4m_resnet20", "epochs": 1, "val_fraction": 0}
    train(TrainConfig(**settings | changes))
    config = json.loads((Path(settings["out"]) / "model/config.json").read_text())
    assert (config["architecture"], config["gzoo"]) == ("p4m_resnet20", {"group": "p4m"})
    timm.create_model(f"local-dir:{settings['out']}/model", pretrained=True)


def test_the_best_validation_epoch_is_kept_and_not_the_last(settings, monkeypatch):
    scores = iter([{"loss": 1.0, "top1": 50.0}, {"loss": 0.9, "top1": 80.0}, {"loss": 0.5, "top1": 70.0}])
    kept = []

    def measure(model, *_):
        kept.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"upright": next(scores)}

    monkeypatch.setattr(gzoo.train, "measure", measure)
    results = train(TrainConfig(**settings | {"epochs": 3}))
    assert (results["best_epoch"], results["best_val_top1"]) == (2, 80.0)
    assert same(weights(settings["out"]), kept[1])
    assert not same(weights(settings["out"]), kept[2])


def test_without_validation_the_last_epoch_is_kept(settings):
    results = train(TrainConfig(**settings | {"val_fraction": 0}))
    assert (results["best_epoch"], results["best_val_top1"], results["n_val"]) == (2, None, 0)
    assert same(weights(settings["out"]), dict(state(settings["out"])["model"]))


def test_with_a_moving_average_it_is_what_is_saved(settings):
    train(TrainConfig(**settings | {"ema_decay": 0.9, "val_fraction": 0}))
    saved = state(settings["out"])
    assert same(weights(settings["out"]), dict(saved["ema"]))
    assert not same(dict(saved["ema"]), dict(saved["model"]))


def test_the_learning_rate_warms_up_and_falls_at_every_update(settings, monkeypatch):
    rates = []
    real = torch.optim.SGD.step

    def step(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    changes = {
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "cosine", "warmup_epochs": 1, "warmup_lr": 0.0},
        "epochs": 3,
        "val_fraction": 0,
    }
    train(TrainConfig(**settings | changes))
    assert len(rates) == 9  # 24 images, 8 a step
    assert rates[0] == 0
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    assert len(set(rates)) == 9


def test_freezing_the_backbone_trains_the_classifier_only_and_leaves_norm_statistics(settings, capsys):
    torch.manual_seed(0)
    train(TrainConfig(**settings | {"freeze_backbone": True, "val_fraction": 0, "epochs": 1}))
    assert "freeze_backbone keeps random weights, as pretrained is not set" in capsys.readouterr().err
    after = weights(settings["out"])
    gzoo.train.seed_everything(0)
    before = timm.create_model("test_resnet", num_classes=2).state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"fc.weight", "fc.bias"}


def test_layer_decay_gives_lower_layers_smaller_rates(settings):
    train(TrainConfig(**settings | {"layer_decay": 0.5, "epochs": 1}))
    scales = {group["lr_scale"] for group in state(settings["out"])["optimizer"]["param_groups"]}
    assert max(scales) == 1
    assert len(scales) > 2


@pytest.mark.parametrize(
    "path",
    [
        {"auto_augment": "rand-m5-mstd0.5"},
        {"color_jitter": 0.2, "augment_batches": True, "grad_accum": 2, "workers": 2},
    ],
)
def test_every_option_of_augmentation_and_loss_trains(path, settings):
    changes = path | {
        "label_smoothing": 0.1,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 0.5,
        "clip_grad": 1.0,
        "bf16": True,
        "channels_last": True,
        "vflip": 0.5,
        "re_prob": 0.3,
        "rotate": 45.0,
        "crop_padding": 2,
        "image_sizes": [[1, 24], [1, 32]],
    }
    train(TrainConfig(**settings | changes))
    assert [row["size"] for row in log(settings["out"])] == ["24", "32"]
    timm.create_model(f"local-dir:{settings['out']}/model", pretrained=True)


def test_a_batch_in_parts_trains_as_the_whole_batch(settings, tmp_path, monkeypatch):
    """Norm statistics would tell parts from the whole, so the backbone is frozen; 3 parts of 8 images are unequal."""
    changes = {"freeze_backbone": True, "mixup_alpha": 0.2, "optimizer": {"name": "sgd", "lr": 0.5}}
    train(TrainConfig(**settings | changes))
    sizes, real = [], gzoo.train._loss

    def loss(*args):
        mixup, function = real(*args)
        return mixup, lambda logits, targets: sizes.append(len(logits)) or function(logits, targets)

    monkeypatch.setattr(gzoo.train, "_loss", loss)
    train(TrainConfig(**settings | changes | {"grad_accum": 3, "out": str(tmp_path / "parts")}))
    assert sizes[:3] == [3, 3, 2]
    assert_same_curve(log(settings["out"]), log(tmp_path / "parts"))
    parts = weights(tmp_path / "parts")
    assert all(torch.allclose(value, parts[key], atol=1e-5) for key, value in weights(settings["out"]).items())


def test_augmenting_in_batches_changes_the_speed_and_not_the_images(settings, tmp_path):
    """Without random changes both paths train on the same numbers."""
    plain = settings | {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0}
    train(TrainConfig(**plain))
    batches = plain | {"augment_batches": True, "out": str(tmp_path / "batches")}
    results = train(TrainConfig(**batches))
    assert results["n_train"] == 18
    assert_same_curve(log(plain["out"]), log(batches["out"]))
    changed = {"augment_batches": True, "out": str(tmp_path / "changed"), "rotate": 90.0}
    train(TrainConfig(**plain | changed))
    losses = [float(log(run["out"])[0]["train_loss"]) for run in (plain, changed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_on_a_cpu_muon_makes_its_steps_in_float32(settings, monkeypatch):
    taken, orthogonalize = [], timm.optim.muon.zeropower_via_newtonschulz

    def spy(*args, **kwargs):
        taken.append(orthogonalize(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", spy)
    spy(torch.eye(4), steps=5, coefficients=[(3.4445, -4.7750, 2.0315)])
    assert taken.pop().dtype == torch.bfloat16  # by itself
    train(TrainConfig(**settings | {"epochs": 1, "optimizer": {"name": "muon", "lr": 0.01}}))
    assert {step.dtype for step in taken} == {torch.float32}


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_is_left_out_where_a_cpu_would_emulate_it(has_it, settings, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_it)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    taken, forward = [], gzoo.train._forward
    monkeypatch.setattr(gzoo.train, "_forward", lambda *args: taken.append(forward(*args)) or taken[-1])
    results = train(TrainConfig(**settings | {"bf16": True, "epochs": 1}))
    assert {str(logits.dtype) for logits in taken} == {f"torch.{results['dtype']}"}
    assert results["dtype"] == ("bfloat16" if has_it else "float32")
    assert ("no instructions for bfloat16, so the run is in float32" in capsys.readouterr().err) == (not has_it)


def test_winograds_convolutions_change_the_speed_and_not_the_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(gzoo.winograd, "_compiled", lambda function, kernel, shape: function)
    applied, apply = [], gzoo.winograd._Convolution.apply
    monkeypatch.setattr(gzoo.winograd._Convolution, "apply", lambda *args: applied.append(1) or apply(*args))
    settings |= {"model": "resnet20", "optimizer": {"name": "sgd", "lr": 0.01}}
    train(TrainConfig(**settings))
    assert not applied
    train(TrainConfig(**settings | {"winograd": True, "out": str(tmp_path / "winograd")}))
    assert applied
    assert_same_curve(log(settings["out"]), log(tmp_path / "winograd"))


def test_winograd_is_refused_on_a_gpu(settings, tmp_path):
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="winograd is for CPUs, and this is a run on cuda:0; leave it out"):
        gzoo.train._set_up(TrainConfig(**settings | {"winograd": True}), tmp_path, gpu, True)


def in_two_processes(arguments):
    """What `torchrun --nproc-per-node 2 -m gzoo.cli train` leaves behind and prints."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "gzoo.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, "train", *arguments], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def in_two_forks(arguments):
    """The same without the launcher, whose three processes take seconds to start: what it tells each, and its rank."""
    code = fresh.command("train", *arguments)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with ThreadPoolExecutor() as pool:
        each = [
            pool.submit(fresh.run, code, 240, **told, RANK=rank, LOCAL_RANK=rank, CUDA_VISIBLE_DEVICES="")
            for rank in "01"
        ]
    assert [done.result().returncode for done in each] == [0, 0], each[0].result().stderr
    return "".join(done.result().stdout + done.result().stderr for done in each)


@pytest.mark.parametrize("path", [{}, pytest.param({"augment_batches": True}, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(path, settings, tmp_path):
    """Norm statistics would tell slices from the whole, so the backbone is frozen. Epoch 2 is a resumed one."""
    changes = path | {"freeze_backbone": True, "mixup_alpha": 0.2, "rotate": 30.0, "ema_decay": 0.9}
    changes["schedule"] = {"name": "none"}  # a cosine over one epoch, then over two, is another curve
    changes["optimizer"] = {"name": "sgd", "lr": 0.5}
    train(TrainConfig(**settings | changes))
    out = tmp_path / "two"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings | changes | {"out": str(out), "epochs": 1, "grad_accum": 2}))
    arguments = [f"--recipe={recipe}"]
    printed = in_two_processes(arguments) if path else in_two_forks(arguments)
    assert printed.count("epoch 1  lr") == 1  # the main process alone
    printed = in_two_forks(["--resume", f"--out={out}", "--epochs=2"])
    assert printed.count("resuming after epoch 1 of 2") == 1
    assert_same_curve(log(settings["out"]), log(out))
    two = weights(out)
    assert all(torch.allclose(value, two[key], atol=1e-5) for key, value in weights(settings["out"]).items())
    assert (out / "curves.png").stat().st_size > 0


def test_a_batch_that_does_not_divide_by_the_processes_is_an_error(settings, monkeypatch):
    three = SimpleNamespace(num_processes=3, device=torch.device("cpu"), wait_for_everyone=lambda: None)
    monkeypatch.setattr(gzoo.train, "PartialState", lambda **_: three)
    with pytest.raises(ValueError, match="a batch of 8 images does not divide by 3 processes; give --batch-size 9"):
        train(TrainConfig(**settings))
    assert not Path(settings["out"]).exists()


@pytest.mark.parametrize(("device", "count"), [("cuda", 2), ("cuda", 1), ("cpu", 2)])
def test_norms_are_synchronized_over_several_gpus(device, count, settings, monkeypatch):
    class Reached(Exception):
        pass

    def stop(*_, **__):
        raise Reached

    found = SimpleNamespace(num_processes=count, device=torch.device(device), wait_for_everyone=lambda: None)
    monkeypatch.setattr(gzoo.train, "PartialState", lambda **_: found)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    synchronized = []
    real = gzoo.train.convert_sync_batchnorm
    monkeypatch.setattr(gzoo.train, "convert_sync_batchnorm", lambda model: synchronized.append(real(model)) or model)
    monkeypatch.setattr(gzoo.train, "create_optimizer_v2", stop)
    with pytest.raises(Reached):
        train(TrainConfig(**settings))
    norms = [type(m).__name__ for model in synchronized for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert set(norms) == ({"SyncBatchNorm"} if (device, count) == ("cuda", 2) else set())


def test_fine_tuning_starts_from_the_weights_of_an_earlier_run(settings, tmp_path):
    train(TrainConfig(**settings))
    first = weights(settings["out"])
    changes = {"model": settings["out"], "pretrained": True, "out": str(tmp_path / "second"), "epochs": 1}
    train(TrainConfig(**settings | changes | {"optimizer": {"name": "sgd", "lr": 0.0}, "freeze_backbone": True}))
    assert same(weights(tmp_path / "second"), first)


def test_weights_are_averaged_with_those_of_another_run(settings, tmp_path):
    start = settings | {"model": "p4_resnet20", "image_size": 8, "epochs": 1}
    runs = [start | {"out": str(tmp_path / "first")}, start | {"out": str(tmp_path / "second"), "seed": 1}]
    first, second = (train(TrainConfig(**run)) and weights(run["out"]) for run in runs)
    of_both = start | {"grown_from": runs[0]["out"], "averaged_with": runs[1]["out"], "epochs": 0}
    train(TrainConfig(**of_both))
    for key, value in weights(settings["out"]).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[key] + second[key]) / 2)
    with pytest.raises(ValueError, match="averaged_with would average random weights; set pretrained or grown_from"):
        TrainConfig(**start | {"averaged_with": runs[1]["out"]})
    other = train(TrainConfig(**start | {"model": "p4_resnet44", "out": str(tmp_path / "other"), "epochs": 0}))
    with pytest.raises(ValueError, match=r"the two networks differ in .*; take runs of one network"):
        train(TrainConfig(**of_both | {"averaged_with": other["config"]["out"], "out": str(tmp_path / "none")}))


def test_a_network_grows_from_a_run_over_a_subgroup(settings, tmp_path):
    small = settings | {"model": "p4_resnet20", "image_size": 8, "epochs": 1}
    train(TrainConfig(**small | {"model_args": {"subgroup": "c2"}}))
    results = train(
        TrainConfig(**small | {"grown_from": settings["out"], "out": str(tmp_path / "second"), "epochs": 0})
    )
    assert results["grown_from"]["config"]["model_args"] == {"subgroup": "c2"}
    assert (results["epochs"], results["best_epoch"]) == (0, None)
    key = "stages.0.0.conv1.weight"
    before, after = weights(settings["out"])[key], weights(tmp_path / "second")[key]
    assert torch.equal(after[:, :, [0, 2]], before)
    assert not after[:, :, [1, 3]].any()


def test_a_policy_that_timm_does_not_know_is_an_error_before_anything_is_written(settings):
    with pytest.raises(ValueError, match=r"timm knows no such auto_augment foo"):
        train(TrainConfig(**settings | {"auto_augment": "foo"}))
    assert not Path(settings["out"]).exists()


def test_a_start_from_random_weights_is_said_where_others_were_named(settings, tmp_path, capsys):
    train(TrainConfig(**settings | {"epochs": 1}))
    assert "random weights" not in capsys.readouterr().err
    train(TrainConfig(**settings | {"model": settings["out"], "out": str(tmp_path / "second"), "epochs": 0}))
    assert "starting from random weights; --pretrained starts from those of" in capsys.readouterr().err


def test_the_test_split_is_never_opened(settings, tmp_path, monkeypatch):
    source = Path(settings["data"])
    for split in ("train", "test"):
        (tmp_path / "split").mkdir(exist_ok=True)
        (tmp_path / "split" / split).symlink_to(source)
    opened = []
    real = gzoo.train.open_split
    monkeypatch.setattr(gzoo.train, "open_split", lambda name, split: opened.append(split) or real(name, split))
    train(TrainConfig(**settings | {"data": str(tmp_path / "split"), "epochs": 1}))
    assert opened == ["train"]


def test_skipped_images_are_listed_in_the_run_folder(settings, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("bright", "dark"):
        (tmp_path / "data" / name).mkdir()
        for path in (Path(settings["data"]) / name).iterdir():
            (tmp_path / "data" / name / path.name).symlink_to(path)
    (tmp_path / "data/dark/broken.png").write_text("no image")
    results = train(TrainConfig(**settings | {"data": str(tmp_path / "data"), "epochs": 1}))
    assert results["n_train"] + results["n_val"] == 24
    listed = (Path(settings["out"]) / "skipped.txt").read_text().splitlines()
    assert len(listed) == 1
    assert "broken.png" in listed[0]


# --- resuming


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
        {"ema_decay": 0.9, "mixup_alpha": 0.2, "rotate": 30.0, "model_args": {"drop_rate": 0.3}},
        {"val_fraction": 0, "bf16": True, "image_sizes": [[1, 24], [2, 32]], "re_prob": 0.5},
        {"model": "p4_cnn7", "model_args": {"partial": True}},
        {
            "augment_batches": True,
            "rotate": 30.0,
            "mixup_alpha": 0.2,
            "image_sizes": [[1, 24], [2, 32]],
            "re_prob": 0.5,
        },
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(settings, tmp_path, monkeypatch, changes):
    whole = settings | changes | {"epochs": 3}
    train(TrainConfig(**whole))
    broken = whole | {"out": str(tmp_path / "broken")}
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            train(TrainConfig(**broken))
    torch.manual_seed(99)  # what ran before must not matter
    train(TrainConfig(**broken), resume=True)
    assert same(weights(whole["out"]), weights(broken["out"]))
    for key in ("model", "ema", "optimizer", "epoch"):
        assert same(state(whole["out"])[key], state(broken["out"])[key])
    assert log(whole["out"]) == log(broken["out"])


def test_another_seed_is_another_run(settings, tmp_path):
    """The control of the test above: equality is not for free."""
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"seed": 1, "out": str(tmp_path / "other")}))
    assert not same(weights(settings["out"]), weights(tmp_path / "other"))
    assert log(settings["out"]) != log(tmp_path / "other")


def test_a_finished_run_resumed_says_so_and_changes_nothing(settings, capsys):
    train(TrainConfig(**settings))
    before = weights(settings["out"]), log(settings["out"])
    train(TrainConfig(**settings), resume=True, command="gzoo train --resume")
    assert "already finished after epoch 2 of 2" in capsys.readouterr().out
    assert same(before, (weights(settings["out"]), log(settings["out"])))
    assert "--resume" not in (Path(settings["out"]) / "results.json").read_text()


def test_a_finished_run_goes_on_if_it_is_given_more_epochs(settings):
    train(TrainConfig(**settings), command="first")
    results = train(resume_config({}, {"out": settings["out"], "epochs": 3}), resume=True, command="second")
    assert (results["epochs"], results["command"]) == (3, "first; second")
    assert len(log(settings["out"])) == 3


def test_resuming_with_another_config_is_an_error_that_names_the_difference(settings):
    train(TrainConfig(**settings))
    config = resume_config({}, {"out": settings["out"], "batch_size": 4, "seed": 3, "workers": 0, "epochs": 9})
    with pytest.raises(ValueError, match=r"another config \(batch_size: 8 -> 4; seed: 0 -> 3\)"):
        train(config, resume=True)


def test_resuming_with_other_images_is_an_error(settings, tmp_path):
    train(TrainConfig(**settings))
    moved = tmp_path / "moved.pt"
    saved = state(settings["out"])
    saved["n_train"] += 1
    torch.save(saved, moved)
    moved.rename(Path(settings["out"]) / "checkpoint.pt")
    with pytest.raises(ValueError, match="has changed since the run began: 19 training images"):
        train(TrainConfig(**settings), resume=True)


def test_resuming_with_relabelled_images_is_an_error(settings, tmp_path):
    shutil.copytree(settings["data"], data := tmp_path / "data")
    settings["data"] = str(data)
    train(TrainConfig(**settings))
    image = next(data.glob("**/dark/*"))
    image.rename(data / "bright" / "moved.png")  # as many images as before
    with pytest.raises(ValueError, match="has changed since the run began: other images"):
        train(TrainConfig(**settings), resume=True)


def test_resuming_with_fewer_epochs_than_there_were_is_an_error(settings):
    train(TrainConfig(**settings))
    before = (Path(settings["out"]) / "results.json").read_text()
    with pytest.raises(ValueError, match="has had 2 epochs, more than epochs = 1; give at least as many"):
        train(resume_config({}, {"out": settings["out"], "epochs": 1}), resume=True)
    assert (Path(settings["out"]) / "results.json").read_text() == before


def test_a_flag_on_resuming_changes_what_it_names_of_the_run(settings):
    train(TrainConfig(**settings | {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.5}}))
    config = resume_config({}, {"out": settings["out"], "optimizer": {"lr": 0.1}, "epochs": 3})
    assert config.optimizer == {"name": "sgd", "lr": 0.1, "momentum": 0.5}
    assert train(config, resume=True)["epochs"] == 3


def test_a_finished_run_whose_model_is_gone_gets_the_last_one(settings):
    train(TrainConfig(**settings))
    shutil.rmtree(Path(settings["out"]) / "model")
    results = train(TrainConfig(**settings), resume=True)
    assert results["best_epoch"] == results["epochs"]
    assert load_model(settings["out"], pretrained=True).num_classes == 2


def test_out_in_a_folder_of_classes_is_an_error(settings):
    flat = next(Path(settings["data"]).glob("**/dark")).parent
    with pytest.raises(ValueError, match="whose folders are classes; give another --out"):
        train(TrainConfig(**settings | {"data": str(flat), "out": str(flat / "runs")}))


def test_cooldown_epochs_are_of_the_recipes_epochs(settings):
    schedule = {"name": "cosine", "cooldown_epochs": 1, "min_lr": 0.0005}
    train(TrainConfig(**settings | {"schedule": schedule, "epochs": 3}))
    assert float(log(settings["out"])[-1]["lr"]) == pytest.approx(0.0005)


@pytest.mark.parametrize("inside", ["train/run", "Test/run"])
def test_a_run_in_a_split_would_be_a_class(settings, tmp_path, inside):
    shutil.copytree(settings["data"], tmp_path / "photos/train")
    shutil.copytree(settings["data"], tmp_path / "photos/Test")
    with pytest.raises(ValueError, match="whose folders are classes; give another --out"):
        train(TrainConfig(**settings | {"data": str(tmp_path / "photos"), "out": str(tmp_path / "photos" / inside)}))
    beside = {"data": str(tmp_path / "photos"), "out": str(tmp_path / "photos/runs/first"), "epochs": 1}
    assert train(TrainConfig(**settings | beside))["epochs"] == 1


def test_what_fails_in_its_first_epoch_leaves_its_folder_empty(settings):
    small = settings | {"model": "cnn7", "image_size": 28, "epochs": 1}
    with pytest.raises(ValueError, match=r"no statistics: .*Give a batch_size of 2 or more"):
        train(TrainConfig(**small | {"batch_size": 1}))
    assert not any(Path(settings["out"]).iterdir())
    assert train(TrainConfig(**small))["epochs"] == 1


def test_a_resumed_run_keeps_its_checkpoint_when_its_first_epoch_fails(settings, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gzoo.train, "_train_epochs", stop)
    with pytest.raises(KeyboardInterrupt, match="go on with"):
        train(TrainConfig(**settings))
    monkeypatch.setattr(gzoo.train, "_train_epochs", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(TrainConfig(**settings), resume=True)
    assert state(settings["out"])["epoch"] == 0


def test_a_run_may_lie_beside_parquet_files(settings, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    paths = [str(path) for path in sorted(Path(settings["data"]).glob("*/*.png"))]
    rows = {"image": paths, "label": [int("dark" in path) for path in paths]}
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "table/train.parquet"))
    config = {"data": str(tmp_path / "table"), "out": str(tmp_path / "table/run"), "epochs": 1}
    assert train(TrainConfig(**settings | config))["epochs"] == 1


def test_an_out_that_is_a_file_or_cannot_be_made_is_an_error(settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder as --out"):
        train(TrainConfig(**settings | {"out": str(tmp_path / "file")}))
    with pytest.raises(ValueError, match=r"run cannot be made \(.*\); give another --out"):
        train(TrainConfig(**settings | {"out": str(tmp_path / "file/run")}))


def test_a_run_says_what_it_trains_on(settings, capsys):
    train(TrainConfig(**settings | {"epochs": 1}))
    left = "(2 images, others in each, make no whole one and are left out)"
    said = f"gzoo: 18 images to train on, 2 batches of 8 an epoch {left}; 6 to validate on\n"
    assert said in capsys.readouterr().err


def test_a_run_goes_on_where_its_images_were_moved_to(settings, tmp_path):
    train(TrainConfig(**settings | {"epochs": 1}))
    shutil.copytree(settings["data"], tmp_path / "moved")
    flags = {"out": settings["out"], "data": str(tmp_path / "moved"), "epochs": 2}
    assert train(resume_config({}, flags), resume=True)["epochs"] == 2


def test_a_new_run_in_a_folder_that_is_in_use_is_an_error(settings):
    Path(settings["out"]).mkdir()
    (Path(settings["out"]) / "notes.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder; give another --out, or --resume"):
        train(TrainConfig(**settings))


def test_resuming_where_nothing_ran_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        resume_config({}, {"out": str(tmp_path)})


def test_a_checkpoint_that_is_cut_off_is_an_error(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        resume_config({}, {"out": str(tmp_path)})


# --- what goes wrong


def test_a_wrong_setting_fails_before_anything_is_written(settings):
    for change, message in (
        ({"model": "test_resnt"}, "no such model; near are"),
        ({"model": "no/such/folder"}, "no such folder"),
        ({"optimizer": {"name": "sdg", "lr": 0.1}}, "not found in registry; near are .*sgd.*list_optimizers"),
        ({"optimizer": {"name": "adamw", "learning_rate": 0.1}}, "unexpected keyword .*; the learning rate is lr"),
        ({"optimizer": {"name": "sgd", "lr": (0, 1)}}, r"optimizer.lr is \(0, 1\); it takes a number, such as lr=0.01"),
        ({"optimizer": {"name": "sgd", "lr": 0.1, "momentun": 0.9}}, "momentun"),
        ({"schedule": {"name": "cosin"}}, "'cosin'.*; timm's are cosine, tanh"),
        ({"schedule": {"name": "plateau"}}, "steps by updates"),
        ({"schedule": {"name": "cosine", "cooldown_epochs": 3}}, "warm-up and cooldown take 3 epochs, and there are 2"),
        ({"schedule": {"name": "cosine", "cooldown_epochs": 2}}, "warm-up and cooldown take 2 epochs, and there are 2"),
        ({"schedule": {"name": "cosine", "warmup_epochs": 3}}, "warm-up and cooldown take 3 epochs, and there are 2"),
        ({"schedule": {"name": "cosine", "cycle_limit": 2}}, "runs for 4 epochs, the recipe for 2; leave cycles out"),
        ({"optimizer": {"name": "adahessian", "lr": 0.1}}, "adahessian needs second derivatives"),
        ({"interpolation": "random"}, "interpolation is 'random'; accepted are nearest, bilinear"),
        ({"scale": 0.5}, "scale is 0.5; it takes two numbers, such as 0.5 and 1 or none"),
        ({"image_sizes": (1, 28)}, r"it takes pairs of epochs and size, such as \[\[2, 16\], \[8, 32\]\] or none"),
        ({"model_args": {"in_chans": 4}, "color_jitter": 0.4}, "color_jitter changes images of 1 or 3 channels, not 4"),
        ({"interpolation": "lanczos", "auto_augment": "original"}, "not lanczos; leave it out"),
        ({"model_args": {"in_chans": 4}, "auto_augment": "rand-m9"}, "images of 1 or 3 channels, not 4"),
        ({"color_jitter": 0.4, "auto_augment": "rand-m9"}, "in its own way, without color_jitter; set one"),
        ({"zoom": [1.1, 0.9]}, "zoom is 1.1 to 0.9; give the smaller number first"),
        ({"scale": [0.5, 3.0]}, "scale is .*; it must be at most 1"),
        ({"image_sizes": [[-3, 32], [1, 32]]}, "epochs and sizes must be at least 1"),
        ({"model_args": {"in_chan": 1}}, "in_chan"),
        ({"mean": [0.1, 0.2]}, "mean has 2 values; the model takes 3 channels"),
        ({"model": "test_vit", "image_size": 33}, "cannot take images of 33x33"),
        ({"mixup_alpha": 0.2, "batch_size": 7}, "a batch of 7 images is odd"),
        ({"grad_accum": 9}, "grad_accum is 9; a batch of 8 images has 8 parts at most"),
        ({"data": settings["data"] + "/nowhere"}, "no such folder"),
        ({"augment_batches": True, "auto_augment": "rand-m5"}, "leave it out, or augment_batches"),
        ({"augment_batches": True, "model_args": {"in_chans": 4}}, "takes models of 1 or 3 channels, not 4"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(TrainConfig(**settings | change))
        assert not Path(settings["out"]).exists()


def test_a_nan_loss_stops_at_its_step_and_keeps_the_last_good_checkpoint(settings, monkeypatch):
    real, steps = gzoo.train._loss, []

    def loss(*args):
        mixup, function = real(*args)

        def counted(*batch):
            steps.append(1)
            return function(*batch) * (float("nan") if len(steps) == 4 else 1)

        return mixup, counted

    monkeypatch.setattr(gzoo.train, "_loss", loss)
    with pytest.raises(FloatingPointError, match=r"the loss in epoch 2, step 2 is nan.*state after epoch 1"):
        train(TrainConfig(**settings | {"epochs": 3}))
    saved = state(settings["out"])
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_nan_in_validation_alone_stops_the_run_too(settings, monkeypatch):
    monkeypatch.setattr(gzoo.train, "measure", lambda *_: {"upright": {"loss": float("nan"), "top1": 0.0}})
    with pytest.raises(FloatingPointError, match="the validation loss after epoch 1 is nan"):
        train(TrainConfig(**settings))
    assert not any(Path(settings["out"]).iterdir())


class HalfFull(io.FileIO):
    """A file on a disk that fills up while it is written."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(path, mode):
    """`open` where checkpoints no longer fit."""
    return HalfFull(path, mode) if "checkpoint.pt" in str(path) else open(path, mode)


def test_a_full_disk_keeps_the_checkpoint_before_and_leaves_no_half_file(settings, monkeypatch):
    real = gzoo.train._train_one_epoch

    def one_epoch(run, *args):
        if run.epoch == 1:
            patch.setattr(gzoo.weights, "open", full_disk, raising=False)
        return real(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(gzoo.train, "_train_one_epoch", one_epoch)
        with pytest.raises(OSError, match=r"checkpoint.pt cannot be written, the one from before is intact.*disk full"):
            train(TrainConfig(**settings))
    assert state(settings["out"])["epoch"] == 1
    assert not list(Path(settings["out"]).rglob("*.tmp"))
    assert train(TrainConfig(**settings), resume=True)["epochs"] == 2  # with room again, it goes on


def test_write_atomically_replaces_a_file_whole(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_ctrl_c_says_how_to_go_on(settings, monkeypatch):
    real = gzoo.train._loss

    def loss(*args):
        if Path(settings["out"], "log.csv").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(gzoo.train, "_loss", loss)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2; go on with: gzoo train --resume --out"):
            train(TrainConfig(**settings))
    finally:
        signal.signal(signal.SIGINT, before)
    assert state(settings["out"])["epoch"] == 1


def test_sigterm_stops_a_run_as_ctrl_c_does(settings, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gzoo.train, "_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1"):
        train(TrainConfig(**settings))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_process_loses_at_most_one_epoch_and_resumes_bit_for_bit(settings, tmp_path):
    """SIGKILL at a moment nobody chose, then --resume, beside a run that was left alone."""
    killed = settings | {"epochs": 30, "batch_size": 6}
    out = Path(killed["out"])
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in killed.items()]
    process = fresh.start(fresh.command("train", *arguments))
    try:
        end = time.monotonic() + 120
        while not (out / "log.csv").exists() and time.monotonic() < end and process.is_alive():
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    done = state(out)["epoch"]
    assert 1 <= done < 30
    assert abs(len(log(out)) - done) <= 1

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process above: sums depend on how they are shared out
    try:
        train(resume_config({}, {"out": str(out)}), resume=True)
        train(TrainConfig(**killed | {"out": str(tmp_path / "alone")}))
    finally:
        torch.set_num_threads(threads)
    assert log(out) == log(tmp_path / "alone")
    assert same(state(out)["model"], state(tmp_path / "alone")["model"])
    assert same(weights(out), weights(tmp_path / "alone"))


def test_the_soft_penalty_holds_the_residual_filters_near_zero(settings):
    soft = settings | {"model": "p4_cnn7", "model_args": {"soft": True, "in_chans": 3}}
    soft["optimizer"] = {"name": "sgd", "lr": 0.1}  # its steps grow with the gradient, those of Adam do not
    norms = []
    for weight in (0.0, 5.0):
        train(TrainConfig(**soft | {"soft_penalty": weight, "out": f"{settings['out']}{weight}"}))
        found = weights(f"{settings['out']}{weight}")
        norms.append(sum(value.square().sum() for key, value in found.items() if key.endswith("residual")))
    assert norms[0] > 2 * norms[1] > 0
    with pytest.raises(ValueError, match="is not soft"):
        train(TrainConfig(**settings | {"soft_penalty": 1.0}))
    with pytest.raises(ValueError, match=r"subset_lr is 1.0, and \w+ is not partial"):
        train(TrainConfig(**settings | {"subset_lr": 1.0}))
    with pytest.raises(ValueError, match=r"soft_penalty is -1.0; it must be at least 0"):
        TrainConfig(**settings | {"soft_penalty": -1.0})


def test_what_a_partial_model_keeps_has_a_rate_of_its_own(settings):
    partial = settings | {"model": "p4_cnn7", "model_args": {"partial": True}, "epochs": 1}
    moved = []
    for rate in (0.0, 0.5):
        train(TrainConfig(**partial | {"subset_lr": rate, "out": f"{settings['out']}{rate}"}))
        assert float(log(f"{settings['out']}{rate}")[-1]["lr"]) < 1e-3  # that of the weights
        found = weights(f"{settings['out']}{rate}")
        moved.append(max((value - 2).abs().max() for key, value in found.items() if key.endswith("logits")))
    assert moved[0] == 0
    assert moved[1] > 0.1


POSE = {"model": "p4_cnn7", "model_args": {"head": "pose", "in_chans": 3}, "hflip": 0.0}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two classes with an upright: the upper half is bright, in red or in blue."""
    folder = tmp_path_factory.mktemp("halves")
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir()
        for i in range(12):
            image = np.zeros((28, 28, 3), dtype=np.uint8)
            image[:14, :, channel] = 200 + i
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def test_class_and_pose_are_learned_from_upright_images(settings, halves):
    options = {"data": str(halves), "epochs": 12, "optimizer": {"name": "adamw", "lr": 0.02}, "scale": (1.0, 1.0)}
    train(make_config(settings | POSE | options | {"image_size": 28, "label_smoothing": 0.1, "mixup_alpha": 0.1}))
    assert float(log(settings["out"])[-1]["val_top1"]) == 100
    model = load_model(settings["out"], pretrained=True)
    result = evaluate(model, open_split(str(halves), "train"), transforms=True)
    assert (result["top1"], result["pose_top1"]) == (100, 100)
    assert set(result["transforms_pose"].values()) == {100.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vflip": 0.5}, "vflip is 0.5, but p4_cnn7 learns its pose from upright images; the most is 0"),
        ({"transpose": 0.5}, "transpose is 0.5, but p4_cnn7"),
        ({"rotate": 180.0}, "rotate is 180.0, but p4_cnn7 learns its pose from upright images; the most is 45"),
        ({"model": "c8_cnn7", "rotate": 30.0}, "rotate is 30.0, but c8_cnn7 .* the most is 22.5"),
        ({"model": "c8_cnn7", "auto_augment": "rand-m9"}, "by up to 30 degrees, but c8_cnn7 learns poses 45 degrees"),
        ({"model": "p4m_cnn7", "hflip": 0.5}, "hflip is 0.5, but p4m_cnn7"),
    ],
)
def test_images_that_are_turned_do_not_teach_a_pose(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(settings | POSE | changes))
    assert not Path(settings["out"]).exists()


@pytest.mark.parametrize("changes", [{"model": "p4m_unet"}, {"model_args": {"features_only": True}}])
def test_what_gives_no_logits_is_no_classifier(settings, changes):
    with pytest.raises(ValueError, match=r"gives no logits \(B, classes\), so it is no classifier"):
        train(make_config(settings | changes))
