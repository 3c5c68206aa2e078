"""The gzoo command: what it prints, which files it writes, which exit code it returns."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import timm
from PIL import Image

import gzoo
import gzoo.train
from gzoo.cli import _listed, _parser, _value, main


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, low in (("bright", 120), ("dark", 0)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(low, low + 100, (32, 32), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def recipe(images, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: test_resnet\ndata: {images}\nout: {tmp_path / 'run'}\nepochs: 3\nbatch_size: 4\nimage_size: 32\n"
        "model_args: {in_chans: 1}\nval_fraction: 0.25\noptimizer: {name: adamw, lr: 1.0e-2}\n"
    )
    return str(path)


def test_train_then_eval_then_predict(recipe, images, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "--recipe", recipe, "--optimizer", "lr=2e-3", "--epochs", "2", "--no-bf16"]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["config"]["optimizer"] == {"name": "adamw", "lr": 0.002}
    assert results["epochs"] == 2
    assert results["command"] == f"gzoo train --recipe {recipe} --optimizer lr=2e-3 --epochs 2 --no-bf16"

    report = str(tmp_path / "eval.json")
    assert main(["eval", "--model", out, "--data", str(images), "--transforms", "--json", report]) == 0
    written = json.loads((tmp_path / "eval.json").read_text())
    assert (written["n"], len(written["transforms"])) == (16, 8)
    assert "top1, flip + 90 degrees" in capsys.readouterr().out

    assert main(["predict", str(images / "test/dark/0.png"), "--model", out]) == 0
    assert "  dark" in capsys.readouterr().out


def test_resume_needs_only_the_folder_of_the_run(recipe, tmp_path, capsys):
    assert main(["train", "--recipe", recipe]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "already finished" in capsys.readouterr().out


def test_resume_with_another_setting_is_an_error(recipe, tmp_path, capsys):
    assert main(["train", "--recipe", recipe, "--epochs", "1"]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--batch-size", "8"]) == 1
    assert "batch_size: 4 -> 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "model and data and out missing"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--recipe", "nowhere.yaml"], "no such recipe"),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--epochs", "many"], "epochs is 'many'; it takes int"),
        (["eval", "--model", "test_resnet", "--data", "/nowhere"], "no such folder"),
        (["predict", "a.png", "--model", "resnt"], "no such model"),
        (["predict", "a.png", "--model", "./nowhere"], "no such folder"),
        (["data", "rotmnist", "--mnist", "/nowhere", "--out", "o"], "no such folder"),
        (["predict", "a.png", "--model", "tests"], "there is no config.json in it; a folder with a model is the --out"),
        (
            ["check", "test_vit", "--group", "p4", "--size", "33"],
            "test_vit takes no images of 33x33 pixels; give",
        ),
        (["push", "tests", "--dry-run"], "say whose repository tests is to be: --org YOU"),
        (["import", "equivision", "a.pt", "--out", "o"], "say which network the file is of; it has d1resnet18"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_1(arguments, message, capsys):
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("gzoo: error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["trian"], ["eval"], ["train", "--epoch-s", "3"], ["train", "--optimizer", "sgd"]),
        ["check", "--size", "33", "p4m_resnet20"],
        *(["check", "p4_cnn7", "--size", size] for size in ("28x", "x28", "28x28x28", "28.0")),
        ["mnist6", "--mnist", "m", "--json", "no/such/folder.json"],
        ["mnist6", "--mnist", "m", "--json", "."],
        ["eval", "--model", "m", "--data", "d", "--batch-size", "0"],
        ["eval", "--model", "m", "--data", "d", "--batch-size", "two"],
        ["eval", "--model", "m", "--data", "d", "--workers", "-1"],
        ["check", "p4_cnn7", "--tolerance", "nan"],
        ["train", "--subset", "0.1"],  # which is not --subset-lr cut short
        ["data", "rotmnist", "--mnist", "m", "--ou", "o"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: gzoo" in capsys.readouterr().err


def test_a_fault_of_gzoo_itself_is_not_hidden(recipe, monkeypatch):
    def fault(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(gzoo.train, "train", fault)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--recipe", recipe])


@pytest.mark.parametrize(
    "error", [FloatingPointError("loss is nan"), OSError("disk full"), KeyboardInterrupt("stopped")]
)
def test_what_stops_a_run_is_exit_code_1(recipe, monkeypatch, capsys, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(gzoo.train, "train", stop)
    assert main(["train", "--recipe", recipe]) == 1
    assert f"gzoo: error: {error}" in capsys.readouterr().err


def test_the_version_names_gzoo_and_what_it_stands_on(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == ", ".join(f"{n} {version(n)}" for n in ("gzoo", "timm", "torch", "escnn")) + "\n"


def test_flags_spell_true_false_and_null_as_recipes_do():
    assert [_value(text) for text in ("false", "True", "null", "1e-2", "sgd")] == [False, True, None, 0.01, "sgd"]


@pytest.mark.parametrize(
    ("given", "value"), [(["0.5", "1"], [0.5, 1]), (["[0.5, 1]"], [0.5, 1]), (["(0.5, 1)"], (0.5, 1)), (["null"], None)]
)
def test_flags_of_several_numbers_take_them_one_by_one_or_as_a_list(given, value):
    assert _listed(_parser(["train"]).parse_args(["train", "--scale", *given]).scale) == value


def test_a_command_of_several_processes_names_what_launched_them(recipe, monkeypatch):
    commands = []
    monkeypatch.setattr(gzoo.train, "train", lambda config, resume, command: commands.append(command))
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert main(["train", "--recipe", recipe]) == 0
    launched = f"python -m torch.distributed.run --nproc-per-node=2 -m gzoo.cli train --recipe {recipe}"
    assert commands == [f"gzoo train --recipe {recipe}", launched]


def test_eval_says_that_weights_are_random(recipe, images, capsys):
    assert main(["eval", "--model", "test_resnet", "--data", str(images)]) == 1  # it knows 1000 classes
    assert "these are random weights; --pretrained loads those of test_resnet" in capsys.readouterr().err


def test_help_lists_every_entry_of_a_recipe(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in ("--label-smoothing", "--image-sizes", "--freeze-backbone", "--crop-padding"):
        assert name in text


def test_predict_lists_unreadable_images_and_exits_1_after_the_others(recipe, images, tmp_path, capsys):
    assert main(["train", "--recipe", recipe, "--epochs", "1"]) == 0
    (tmp_path / "bad.png").write_text("no image")
    paths = [str(tmp_path / "bad.png"), str(images / "test/dark/0.png")]
    report = tmp_path / "report.json"
    assert main(["predict", *paths, "--model", str(tmp_path / "run"), "--json", str(report)]) == 1
    streams = capsys.readouterr()
    assert paths[1] in streams.out
    assert f"{paths[0]} cannot be read" in streams.err
    unreadable, read = json.loads(report.read_text())["predictions"]
    assert (unreadable["path"], read["path"], read["error"]) == (*paths, None)
    assert "cannot identify image file" in unreadable["error"]
    assert set(read["names"]) == {"bright", "dark"}
    assert sum(read["probabilities"]) == pytest.approx(1)


def test_data_rotmnist_passes_its_arguments_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("gzoo.data.make_rotated_mnist", lambda *a: calls.append(a) or {"train": 12_000, "test": 50_000})
    assert main(["data", "rotmnist", "--mnist", "in", "--out", "out"]) == 0
    assert calls == [("in", "out", 20161)]
    assert "12000 images to train and validate, 50000 to test, seed 20161" in capsys.readouterr().out


def test_check_says_to_which_elements_a_partial_network_is_still_equivariant(monkeypatch, capsys):
    model = timm.create_model("p4_cnn7", partial=True)
    for _, subset in gzoo.partial.subsets(model):
        subset.keep([0, 2])
    monkeypatch.setattr("gzoo.predict.load_model", lambda *args: model)
    assert main(["check", "p4_cnn7", "--size", "28"]) == 0
    assert re.search(r"equivariant to 0, 180 alone; the others, given up, err by up to \d", capsys.readouterr().out)


def test_check_exits_with_0_for_an_equivariant_network(capsys):
    assert main(["check", "p4_cnn7", "--size", "28", "29x31"]) == 0
    assert capsys.readouterr().out.endswith(": equivariant\n")
    assert main(["check", "c8_cnn7", "--size", "28"]) == 0
    assert "equivariant to the 4 of 8 elements that fit the pixel grid" in capsys.readouterr().out


def test_check_exits_with_1_past_the_tolerance(capsys):
    assert main(["check", "cnn7", "--group", "p4", "--size", "28"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_check_asks_for_the_group_of_a_plain_network(capsys):
    assert main(["check", "cnn7", "--size", "28"]) == 1
    assert "say which group" in capsys.readouterr().err
