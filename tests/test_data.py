"""Opening image folders, parquet folders and Hub names; splits, transforms, loaders; rotated MNIST."""

import io
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm import create_model
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from gzoo.data import (
    Augmentation,
    class_folders,
    classes_without_training,
    decode_file,
    eval_loader,
    eval_transform,
    input_config,
    make_rotated_mnist,
    open_split,
    set_epoch,
    split_names,
    split_validation,
    train_loader,
    train_transform,
)

CPU = torch.device("cpu")


def write_images(folder, classes=("cat", "dog"), count=4, mode="RGB", size=12):
    """`count` images in folder/<class>/ for each class; every pixel of image i of class c is 40 c + i."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new(mode, (size, size), (40 * c + i,) * len(mode)).save(folder / name / f"{i}.png")
    return folder


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, labels, features=None, **columns):
    """One 28x28 image a label, as the Hub stores it; columns adds or replaces columns."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in labels]
    table = {"image": [{"bytes": png(image), "path": None} for image in images], "label": labels, **columns}
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one"]), **(features or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, features=datasets.Features(types)).to_parquet(str(path))


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def config(size=12, channels=3):
    return {"input_size": (channels, size, size), "mean": (0.5,) * channels, "std": (0.25,) * channels} | {
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


# --- folders


def test_a_folder_of_classes_is_a_training_split_labelled_by_folder_name(tmp_path):
    data = open_split(str(write_images(tmp_path / "x")), "train")
    assert (data.classes, len(data)) == (["cat", "dog"], 8)
    assert [(image.getpixel((0, 0))[0], label) for image, label in data] == [
        *((i, 0) for i in range(4)),
        *((40 + i, 1) for i in range(4)),
    ]


@pytest.mark.parametrize("spelling", ["val", "validation", "valid"])
def test_a_folder_of_splits_has_the_splits_that_its_subfolders_name(tmp_path, spelling):
    write_images(tmp_path / "train")
    write_images(tmp_path / spelling, count=2)
    assert split_names(str(tmp_path)) == ["train", "val"]
    assert (len(open_split(str(tmp_path), "train")), len(open_split(str(tmp_path), "val"))) == (8, 4)
    with pytest.raises(ValueError, match="there is no test split, only train, val"):
        open_split(str(tmp_path), "test")


def test_splits_are_found_in_any_case(tmp_path):
    for name in ("Train", "Test"):
        write_images(tmp_path / name)
    assert split_names(str(tmp_path)) == ["test", "train"]
    assert len(open_split(str(tmp_path), "train")) == 8


@pytest.mark.parametrize("name", ["training_set", "train"])
def test_images_below_the_class_folders_are_an_error(tmp_path, name):
    write_images(tmp_path / name / "day1")
    write_images(tmp_path / "test_set" / "day1")
    with pytest.raises(ValueError, match=r"day1.cat.0.png lies in a folder within a folder, so its class is unclear"):
        open_split(str(tmp_path), "train")


def test_a_fault_in_the_test_split_does_not_stop_training(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "test").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "test" / "flat.png")
    assert len(open_split(str(tmp_path), "train")) == 8
    with pytest.raises(ValueError, match="lie outside a class folder"):
        open_split(str(tmp_path), "test")


def test_a_class_called_test_does_not_make_a_folder_of_classes_a_folder_of_splits(tmp_path):
    assert open_split(str(write_images(tmp_path / "x", ("exam", "test"))), "train").classes == ["exam", "test"]


def test_a_split_without_one_of_the_classes_keeps_the_numbering_of_the_training_split(tmp_path):
    write_images(tmp_path / "train", ("ant", "bee", "cow"))
    write_images(tmp_path / "test", ("bee",))
    assert set(open_split(str(tmp_path), "test").labels) == {1}


def test_a_test_class_that_was_never_trained_on_is_an_error(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", ("cat", "emu"))
    with pytest.raises(ValueError, match=r"classes \['emu'\] have no training images"):
        open_split(str(tmp_path), "test")


def test_hidden_folders_are_no_classes(tmp_path):
    write_images(tmp_path / "x", ("cat", "dog", ".ipynb_checkpoints"))
    assert open_split(str(tmp_path / "x"), "train").classes == ["cat", "dog"]


def test_a_corrupt_image_among_good_ones_is_skipped_and_listed(tmp_path, capsys):
    write_images(tmp_path / "x")
    whole = (tmp_path / "x/cat/0.png").read_bytes()
    (tmp_path / "x/cat/text.png").write_text("this is no image")
    (tmp_path / "x/dog/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x/dog/empty.jpg").touch()
    data = open_split(str(tmp_path / "x"), "train")
    assert len(data) == 8
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in data.skipped] == ["text.png", "cut.png", "empty.jpg"]
    assert capsys.readouterr().err.count("skipped 3 unreadable train images") == 1


def test_good_images_skip_nothing(tmp_path, capsys):
    assert open_split(str(write_images(tmp_path / "x")), "train").skipped == []
    assert "skipped" not in capsys.readouterr().err


def test_images_that_are_all_corrupt_are_an_error(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="none of the 2 train images can be read"):
        open_split(str(tmp_path), "train")


def test_an_empty_folder_is_an_error_that_says_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match=r"no images in class folders.*accepted are"):
        open_split(str(tmp_path), "train")


def test_a_folder_without_class_folders_is_an_error(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="outside a class folder"):
        open_split(str(tmp_path), "train")


def test_a_folder_that_may_not_be_listed_is_an_error_and_not_a_missing_class(tmp_path, monkeypatch):
    write_images(tmp_path / "x")
    real = __import__("os").scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(PermissionError, match="dog"):
        open_split(str(tmp_path / "x"), "train")


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; accepted are"):
        open_split(str(tmp_path / "nowhere"), "train")


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="this is a file"):
        open_split(str(tmp_path / "a.txt"), "train")


def test_training_images_of_one_class_only_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="every training image is of the one class 'cat'"):
        open_split(str(write_images(tmp_path / "x", ("cat",))), "train")


def test_sixteen_bit_images_keep_their_shades(tmp_path):
    write_images(tmp_path / "x")
    Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16)).save(tmp_path / "x/cat/0.png")
    image, _ = open_split(str(tmp_path / "x"), "train")[0]
    assert (image.mode, image.getpixel((0, 0))) == ("L", 128)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([np.full((4, 4), 4095, np.uint16)], "the largest value of an image of 16 bits is below 16384"),
        (2 * [np.zeros((4, 4), np.uint8)], "several pages or frames, and gzoo reads the first of each"),
    ],
)
def test_what_is_lost_of_a_microscopes_file_is_said(tmp_path, pages, message):
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / "x.tif", save_all=True, append_images=others)
    with pytest.warns(UserWarning, match=message):
        decode_file(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("suffix", ["tif", "bmp", "webp"])
def test_every_kind_of_file_that_pil_opens_is_an_image(tmp_path, suffix):
    write_images(tmp_path)
    (tmp_path / "owl").mkdir()
    Image.new("RGB", (12, 12)).save(tmp_path / "owl" / f"0.{suffix}")
    assert open_split(str(tmp_path), "train").classes == ["cat", "dog", "owl"]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_known_white_are_listed_and_not_black(tmp_path, kind):
    write_images(tmp_path)
    Image.fromarray(np.ones((12, 12), kind)).save(tmp_path / "cat" / "9.tif")
    data = open_split(str(tmp_path), "train")
    assert len(data) == 8
    assert "whose black and white are unknown; save 8 or 16 bits" in data.skipped[0]


def test_images_past_the_memory_budget_are_decoded_at_each_access_and_are_the_same(tmp_path):
    source = str(write_images(tmp_path / "x"))
    one = 12 * 12 * 3
    kept, lazy = open_split(source, "train"), open_split(source, "train", memory_budget=3 * one)
    assert sum(isinstance(image, Image.Image) for image in lazy.images) == 3
    assert all(isinstance(image, Image.Image) for image in kept.images)
    assert all(a[0].tobytes() == b[0].tobytes() and a[1] == b[1] for a, b in zip(kept, lazy, strict=True))


# --- parquet and the Hub


def test_a_parquet_folder_in_the_hubs_format_opens_with_its_class_names(tmp_path):
    write_parquet(tmp_path / "d/train.parquet", [0, 1, 1])
    write_parquet(tmp_path / "d/test.parquet", [1])
    assert split_names(str(tmp_path / "d")) == ["test", "train"]
    data = open_split(str(tmp_path / "d"), "train")
    assert (data.classes, data.labels, data[0][0].mode) == (["zero", "one"], [0, 1, 1], "L")


def test_a_corrupt_image_in_a_parquet_file_is_skipped_and_listed(tmp_path):
    good = {"bytes": png(Image.new("L", (8, 8))), "path": None}
    bad = {"bytes": b"no image", "path": None}
    write_parquet(tmp_path / "d/train.parquet", [0, 1, 1], image=[good, bad, good])
    data = open_split(str(tmp_path / "d"), "train")
    assert data.labels == [0, 1]
    assert "row 1" in data.skipped[0]


def test_several_labels_an_image_are_an_error(tmp_path):
    cells = [{"bytes": png(Image.new("L", (8, 8))), "path": None}] * 2
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    (tmp_path / "d").mkdir()
    table = datasets.Dataset.from_dict({"image": cells, "label": [[0, 1], [1]]}, features=features)
    table.to_parquet(str(tmp_path / "d/train.parquet"))
    with pytest.raises(ValueError, match="column 'label' holds a List for each image; one class is needed"):
        open_split(str(tmp_path / "d"), "train")


def test_a_table_of_labels_beside_the_images_is_named_where_it_would_be_missed(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images/a.png")
    (tmp_path / "labels.csv").write_text("a.png,cat")
    with pytest.raises(ValueError, match=r"one class 'images'.*labels.csv is not read: put the images of each class"):
        open_split(str(tmp_path), "train")


def test_a_parquet_file_that_is_cut_off_is_an_error(tmp_path):
    write_parquet(tmp_path / "d/train.parquet", [0, 1])
    path = tmp_path / "d/train.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="its parquet files cannot be read"):
        open_split(str(tmp_path / "d"), "train")


def test_two_label_columns_without_a_usual_name_are_an_error_that_lists_them(tmp_path):
    kind = datasets.ClassLabel(names=["a", "b"])
    rows = {"breed": [0, 1], "coat": [1, 0]}
    write_parquet(tmp_path / "d/train.parquet", [0, 1], {"breed": kind, "coat": kind, "label": kind}, **rows)
    assert open_split(str(tmp_path / "d"), "train").classes == ["a", "b"]  # `label` wins
    table = datasets.load_dataset(str(tmp_path / "d"))["train"].remove_columns("label")
    (tmp_path / "e").mkdir()
    table.to_parquet(str(tmp_path / "e/train.parquet"))
    with pytest.raises(ValueError, match=r"several could be the label: \['breed', 'coat'\]"):
        open_split(str(tmp_path / "e"), "train")


def test_a_table_without_images_is_an_error_that_lists_its_columns(tmp_path):
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "d/train.parquet"))
    with pytest.raises(ValueError, match=r"of the columns \['text', 'label'\] none of them is the image"):
        open_split(str(tmp_path / "d"), "train")


def test_labels_written_as_words_become_classes(tmp_path):
    write_parquet(tmp_path / "d/train.parquet", [0, 0, 0], {"label": datasets.Value("string")}, label=["b", "a", "b"])
    data = open_split(str(tmp_path / "d"), "train")
    assert (data.classes, data.labels) == (["a", "b"], [1, 0, 1])


def test_rows_without_a_label_are_an_error(tmp_path):
    write_parquet(tmp_path / "d/train.parquet", [0, 1, -1])
    with pytest.raises(ValueError, match="row 2 and 0 others have no label"):
        open_split(str(tmp_path / "d"), "train")


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach the Hub"),
    ],
)
def test_a_hub_name_that_cannot_be_opened_is_an_error_that_says_why(monkeypatch, error):
    def load_dataset(name):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=rf"no/such: no such folder.*Hub \({type(error).__name__}"):
        open_split("no/such", "train")


# --- splitting


def test_split_validation_takes_the_same_share_of_every_class(tmp_path):
    data = open_split(str(write_images(tmp_path / "x", ("a", "b", "c"), count=10)), "train")
    train, val = split_validation(data, 0.2, seed=3)
    assert np.bincount(val.labels).tolist() == [2, 2, 2]
    assert np.bincount(train.labels).tolist() == [8, 8, 8]
    everything = sorted(image.getpixel((0, 0)) for part in (train, val) for image, _ in part)
    assert everything == sorted(image.getpixel((0, 0)) for image, _ in data)


def test_split_validation_depends_on_the_seed_alone(tmp_path):
    data = open_split(str(write_images(tmp_path / "x", count=20)), "train")
    ids = [[image.getpixel((0, 0)) for image, _ in split_validation(data, 0.25, seed)[1]] for seed in (1, 1, 2)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.9, 0.999])
def test_a_class_of_two_images_or_more_has_one_in_each_part(tmp_path, fraction):
    data = open_split(str(write_images(tmp_path / "x", count=4)), "train")
    for part in split_validation(data, fraction, seed=0):
        assert set(part.labels) == set(data.labels)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_fraction_that_leaves_a_side_empty_is_an_error(tmp_path, fraction):
    data = open_split(str(write_images(tmp_path / "x")), "train")
    with pytest.raises(ValueError, match="val_fraction"):
        split_validation(data, fraction, 0)


def test_classes_of_one_image_leave_none_to_validate_on(tmp_path):
    data = open_split(str(write_images(tmp_path / "x", count=1)), "train")
    with pytest.raises(ValueError, match="leave none to validate on, as each class has one"):
        split_validation(data, 0.5, 0)


def test_files_that_number_their_classes_in_two_ways_are_refused(tmp_path):
    for name, classes in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        rows = {"image": [Image.new("L", (4, 4))] * 2, "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"train.parquet: its column label has the classes \['a', 'b'\], and that of"):
        open_split(str(tmp_path), "test")


def test_a_class_folder_without_images_is_told_of(tmp_path, capsys):
    folder = write_images(tmp_path / "x", ("a", "b", "c"))
    (folder / "d").mkdir()
    for file in (folder / "c").iterdir():
        file.write_bytes(b"no image")
    open_split(str(folder), "train")
    told = capsys.readouterr().err
    assert "no images in the folders ['d'], so they are no classes" in told
    assert "no image to train on has the classes ['c']" in told
    assert "left out" not in told


def test_files_of_other_formats_are_counted(tmp_path, capsys):
    folder = write_images(tmp_path / "x", ("a", "b"))
    for name in ("a/1.heic", "a/2.HEIC", "b/array.npy", "b/image", "b/.hidden"):
        (folder / name).write_bytes(b"")
    assert len(open_split(str(folder), "train")) == 8
    told = capsys.readouterr().err
    assert "left out as files of no format that PIL opens: 2 .heic, 1 .npy, 1 without an ending\n" in told


def test_classes_of_other_splits_that_training_has_not(tmp_path):
    write_images(tmp_path / "x" / "train", ("a", "b"))
    write_images(tmp_path / "x" / "testing", ("A", "b", "c"))
    (tmp_path / "x" / "testing" / ".hidden").mkdir()
    assert classes_without_training(class_folders(str(tmp_path / "x"))) == ["testing/A", "testing/c"]
    assert classes_without_training(class_folders(str(tmp_path / "x" / "train"))) == []


# --- transforms and loaders


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_mode_get_the_channels_of_the_model(mode, channels):
    for transform in (
        eval_transform(config(8, channels)),
        train_transform(config(8, channels), Augmentation(vflip=0.5, color_jitter=0.2, rotate=20, re_prob=0.5)),
        train_transform(config(8, channels), Augmentation(crop_padding=2, auto_augment="rand-m5-mstd0.5")),
    ):
        assert transform(Image.new(mode, (9, 11))).shape == (channels, 8, 8)


@pytest.mark.parametrize("last", [0, 10, 255])
def test_four_channels_are_four_numbers_whatever_happens_to_the_image(last):
    """PIL would weigh the colours by the fourth, which may be near infrared."""
    image, flat = Image.new("RGBA", (16, 16), (200, 100, 50, last)), {"mean": (0.0,) * 4, "std": (1.0,) * 4}
    for transform in (
        eval_transform(config(8, 4) | flat),
        train_transform(config(8, 4) | flat, Augmentation(crop_padding=0, zoom=(1.5, 1.6))),
        train_transform(config(16, 4) | flat, Augmentation(rotate=90, transpose=0.5, scale=(0.2, 0.3))),
    ):
        y = (transform(image) * 255).round()
        centre = y[:, y.shape[1] // 2, y.shape[2] // 2]
        assert centre.tolist() == [200, 100, 50, last]


def test_a_model_of_two_channels_is_an_error():
    with pytest.raises(ValueError, match="takes 2 channels; images have 1 or 3 or 4"):
        eval_transform(config(8, 2))


def test_mean_and_std_become_one_number_a_channel():
    model = create_model("test_resnet", in_chans=1, num_classes=2)
    own = input_config(model, input_size=(1, 32, 32))
    assert (len(own["mean"]), len(own["std"])) == (1, 1)
    changed = input_config(model, input_size=(1, 32, 32), mean=(0.1,), std=(0.3,))
    assert (changed["mean"], changed["std"], changed["input_size"]) == ((0.1,), (0.3,), (1, 32, 32))


def test_without_augmentation_a_training_image_is_the_validation_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    plain = Augmentation(scale=(1, 1), ratio=(1, 1), hflip=0)
    torch.testing.assert_close(train_transform(config(), plain)(image), eval_transform(config())(image))


def test_padded_crops_shift_the_image_by_whole_pixels_up_to_the_padding():
    torch.manual_seed(0)
    image = Image.new("RGB", (12, 12))
    image.putpixel((6, 6), (255, 255, 255))
    transform = train_transform(config(), Augmentation(crop_padding=2, hflip=0))
    white = [divmod(int(transform(image)[0].argmax()), 12) for _ in range(60)]
    assert {row for row, _ in white} == {column for _, column in white} == {4, 5, 6, 7, 8}


def test_padded_crops_and_resized_crops_exclude_each_other():
    with pytest.raises(ValueError, match="two ways to crop"):
        train_transform(config(), Augmentation(crop_padding=2, scale=(0.5, 1)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, for any fork beside threads
def test_batches_depend_on_seed_and_epoch_and_not_on_the_number_of_workers(tmp_path):
    data = open_split(str(write_images(tmp_path / "x", count=6)), "train")

    def images(workers, seed, epoch):
        loader = train_loader(data, train_transform(config(8), Augmentation(rotate=90)), 4, seed, workers, CPU)
        set_epoch(loader, epoch)
        return torch.cat([images for images, _ in loader])

    first = images(0, 1, 2)
    assert torch.equal(first, images(2, 1, 2))
    assert not torch.equal(first, images(0, 1, 3))
    assert not torch.equal(first, images(0, 2, 2))


def test_augmenting_leaves_the_callers_random_numbers_alone(tmp_path):
    data = open_split(str(write_images(tmp_path / "x")), "train")
    loader = train_loader(data, train_transform(config(8), Augmentation(rotate=90)), 4, 0, 0, CPU)
    torch.manual_seed(5)
    batches = iter(loader)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(batches)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_evaluation_sees_every_image_once_and_in_order(tmp_path):
    data = open_split(str(write_images(tmp_path / "x", count=5)), "train")
    batches = list(eval_loader(data, eval_transform(config()), 4, 0, CPU))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == data.labels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_rotation_interpolates_as_the_config_says(interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8))
    whole = Augmentation(rotate=90, scale=(1, 1), ratio=(1, 1), hflip=0)
    torch.manual_seed(0)
    found = train_transform(config(9, 1) | {"interpolation": interpolation}, whole)(image)
    torch.manual_seed(0)
    turned = transforms.RandomAffine(90, interpolation=InterpolationMode(interpolation))(image)
    assert torch.equal(found, train_transform(config(9, 1), replace(whole, rotate=0))(turned))


# --- rotated MNIST


@pytest.fixture
def small_mnist(tmp_path):
    write_parquet(tmp_path / "mnist/train.parquet", [0, 1] * 5)
    write_parquet(tmp_path / "mnist/test.parquet", [1, 0, 1])
    return str(tmp_path / "mnist")


def test_rotated_mnist_is_what_its_definition_says(small_mnist, tmp_path):
    out = str(tmp_path / "rot")
    assert make_rotated_mnist(small_mnist, out, 7, train_rows=4, more_test_rows=5) == {"train": 4, "test": 8}
    with pytest.raises(FileExistsError, match="is not an empty folder; give another --out"):
        make_rotated_mnist(small_mnist, out, 7, train_rows=4, more_test_rows=5)
    train, test = open_split(small_mnist, "train"), open_split(small_mnist, "test")
    plain = [train[i] for i in range(4)] + [test[i] for i in range(3)] + [train[i] for i in range(4, 9)]
    angles = np.random.default_rng(7).uniform(0, 360, 12)
    rotated = [pair for split in ("train", "test") for pair in open_split(out, split)]
    for (image, label), (result, result_label), angle in zip(plain, rotated, angles, strict=True):
        assert result.tobytes() == image.rotate(angle, Image.Resampling.BICUBIC).tobytes()
        assert (label, result.size, result.mode) == (result_label, (28, 28), "L")


def test_rotated_mnist_follows_from_its_seed(small_mnist, tmp_path):
    def pixels(name, seed):
        make_rotated_mnist(small_mnist, str(tmp_path / name), seed, train_rows=4, more_test_rows=5)
        return [image.tobytes() for image, _ in open_split(str(tmp_path / name), "test")]

    assert pixels("a", 1) == pixels("b", 1)
    assert pixels("a2", 1) != pixels("c", 2)


def test_rotated_mnist_from_too_few_images_is_an_error(small_mnist, tmp_path):
    with pytest.raises(ValueError, match="10 training images; 52000 are needed"):
        make_rotated_mnist(small_mnist, str(tmp_path / "rot"))
