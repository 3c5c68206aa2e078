"""Models from names and folders, and class names for image files."""

import json

import pytest
import timm
import torch
from PIL import Image

from gzoo.data import ImageData, input_config
from gzoo.predict import load_model, names_weights, predict
from gzoo.train import TrainConfig, export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a run writes it: test_resnet with random weights and two named classes."""
    out = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    config = TrainConfig(model="test_resnet", data="pets", out=str(out))
    export(model, out / "model", input_config(model, input_size=(3, 32, 32)), ["cat", "dog"], config)
    return out


@pytest.fixture
def images(tmp_path):
    paths = []
    for i, mode in enumerate(["RGB", "L", "RGBA"]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new(mode, (40, 30), (90 * i,) * len(mode)).save(paths[-1])
    return paths


def test_what_names_weights_and_what_an_architecture_alone(folder):
    assert all(map(names_weights, (str(folder), "hf-hub:lab/cells", "p4_cnn7.rotmnist")))
    assert not names_weights("p4_cnn7")


@pytest.mark.parametrize("inner", ["", "model"])
def test_a_run_and_its_model_folder_both_load(folder, inner):
    model = load_model(str(folder / inner), pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog"]


def test_predictions_are_the_models_probabilities_best_first(folder, images):
    model = load_model(str(folder), pretrained=True)
    results = predict(model, images)
    assert [result.path for result in results] == images
    for result in results:
        assert set(result.names) == {"cat", "dog"}
        assert sum(result.probabilities) == pytest.approx(1)
        assert list(result.probabilities) == sorted(result.probabilities, reverse=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = model(transform(Image.open(images[0]))[None]).softmax(1)[0]
    assert results[0].probabilities[0] == pytest.approx(expected.max().item(), abs=1e-6)


def test_a_model_with_poses_names_the_pose(images):
    model = timm.create_model("p4_resnet20", num_classes=2, head="pose")
    results = predict(model, images[:1], topk=8)
    assert set(results[0].names) == {f"{label}, pose {angle}" for label in "01" for angle in (0, 90, 180, 270)}
    assert sum(results[0].probabilities) == pytest.approx(1)


def test_topk_limits_the_classes(folder, images):
    assert [len(result.names) for result in predict(load_model(str(folder), True), images, topk=1)] == [1, 1, 1]
    with pytest.raises(ValueError, match="topk is 0"):
        predict(load_model(str(folder), True), images, topk=0)


def test_an_image_that_cannot_be_read_is_reported_and_the_others_are_predicted(folder, images, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    results = predict(load_model(str(folder), True), [images[0], str(tmp_path / "bad.png"), "nowhere.png", images[1]])
    assert [bool(result.names) for result in results] == [True, False, False, True]
    assert results[1].error.startswith("UnidentifiedImageError")
    assert results[2].error.startswith("FileNotFoundError")


def test_a_network_of_maps_predicts_no_classes(images):
    with pytest.raises(ValueError, match=r"gives no logits \(B, classes\)"):
        predict(timm.create_model("p4_unet"), images)


def test_classes_without_names_are_numbered(images):
    model = timm.create_model("test_resnet", num_classes=3)
    assert set(predict(model, images[:1])[0].names) == {"0", "1", "2"}


def test_an_unknown_name_is_an_error_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"resnet1: no such model; near are .*resnet1"):
        load_model("resnet1", pretrained=False)


def test_a_name_without_weights_is_an_error_if_weights_are_asked_for(monkeypatch):
    monkeypatch.setattr(timm.models, "is_model_pretrained", lambda name: False)
    with pytest.raises(ValueError, match="there are no pretrained weights"):
        load_model("test_resnet", pretrained=True)


def test_a_path_to_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"), pretrained=True)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(str(tmp_path), pretrained=True)


def test_weights_that_are_cut_off_are_an_error(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        content = (folder / "model" / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == "config.json" else content[:-1000])
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        load_model(str(tmp_path), pretrained=True)


def test_weights_of_another_architecture_are_an_error(folder, tmp_path):
    config = json.loads((folder / "model/config.json").read_text()) | {"architecture": "test_byobnet"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="its weights cannot be loaded"):
        load_model(str(tmp_path), pretrained=True)


def test_an_image_data_of_the_run_folder_keeps_its_label_order(folder):
    from gzoo.evaluate import match_classes

    data = ImageData([Image.new("RGB", (8, 8))] * 2, [0, 1], ["dog", "cat"])
    assert match_classes(load_model(str(folder), True), data).labels == [1, 0]
