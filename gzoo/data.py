"""From a folder, a parquet directory or a Hub name to batches of normalised images and labels.

`open_split` finds the images and decodes each of them once, so a corrupt one is known, skipped and listed before the
first step. What fits the memory budget stays decoded: small images then cost an epoch no decoding. `train_loader` and
`eval_loader` put timm's transforms on top. `make_rotated_mnist` writes the rotated-MNIST set.
"""

from __future__ import annotations

import io
import os
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from gzoo.weights import write_atomically

Split = Literal["train", "val", "test"]

# How folders and Hub datasets spell the three splits, in order of preference.
_SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_LABEL_COLUMNS = ("label", "labels", "fine_label")  # in order of preference where several columns hold classes
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels of a model -> how PIL calls such an image
MEMORY_BUDGET = 2 << 30  # bytes of decoded images that are kept
_ACCEPTED = (
    "accepted are a folder with train/<class>/* and optionally val/ and test/, a folder with <class>/*, a folder of "
    "parquet files in the Hub's format, and the name of a dataset on the Hugging Face Hub"
)


class ImageData(Dataset):
    """Images with labels, as (PIL image, class index).

    Args:
        images: one a label; each is a decoded image, or a function that decodes it.
        labels: class indices.
        classes: the name of each class.
        skipped: one line for every image that could not be read.
    """

    def __init__(self, images: list[Any], labels: list[int], classes: list[str], skipped: Sequence[str] = ()) -> None:
        self.images, self.labels, self.classes, self.skipped = images, labels, classes, list(skipped)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index]
        return (image if isinstance(image, Image.Image) else image()), self.labels[index]

    def subset(self, indices: Sequence[int]) -> ImageData:
        return ImageData([self.images[i] for i in indices], [self.labels[i] for i in indices], self.classes)


# --- finding the images ---------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Images that are found and not decoded yet: for each a name, a function that decodes it, and a label."""

    names: list[str]
    decoders: list[partial]
    labels: list[int]
    classes: list[str]


def open_split(source: str, split: Split, memory_budget: int = MEMORY_BUDGET) -> ImageData:
    """Open one split of a data set. Unreadable images are left out and listed in `.skipped`.

    Args:
        source: a folder of images, a folder of parquet files, or the name of a dataset on the Hub.
        split: "train", "val" or "test", whichever way the source spells it.
        memory_budget: bytes of decoded images that are kept in memory; later images are decoded at each access.

    Raises:
        FileNotFoundError: there is no such folder or dataset.
        ValueError: it has no such split, no images, one class only, or columns that cannot be told apart.
    """
    found = _find_splits(source)
    if split not in found:
        raise ValueError(
            f"{source}: there is no {split} split, only {', '.join(sorted(found))}. Choose one of these; a folder of "
            f"images gets one as {Path(source) / split}/<class>/*"
        )
    rows = found[split]()
    images, skipped = _decode_all(rows, memory_budget, f"reading {split}")
    good = [i for i, image in enumerate(images) if image is not None]
    if not good:
        raise ValueError(f"{source}: none of the {len(images)} {split} images can be read; the first: {skipped[0]}")
    data = ImageData([images[i] for i in good], [rows.labels[i] for i in good], rows.classes, skipped)
    if split == "train" and len(set(data.labels)) < 2:
        name = rows.classes[data.labels[0]]
        tables = [path.name for path in Path(source).expanduser().glob("*.[ct]sv")]
        hint = f". {tables[0]} is not read: put the images of each class in a folder" if tables else ""
        raise ValueError(
            f"{source}: every training image is of the one class {name!r}; a classifier needs two or more{hint}"
        )
    if skipped:
        print(f"gzoo: {source}: skipped {len(skipped)} unreadable {split} images, first {skipped[0]}", file=sys.stderr)
    if split == "train" and (without := [rows.classes[i] for i in set(range(len(rows.classes))) - set(data.labels)]):
        print(f"gzoo: {source}: no image to train on has the classes {sorted(without)}", file=sys.stderr)
    return data


def split_names(source: str) -> list[str]:
    """Which of "train", "val" and "test" the source has."""
    return sorted(_find_splits(source))


def class_folders(source: str) -> dict[str, Path]:
    """By split the folder whose subfolders are classes; that of all images is "train". None for parquet."""
    folder = Path(source).expanduser()
    return _split_folders(folder) if folder.is_dir() and not _has_parquet(folder) else {}


def classes_without_training(folders: Mapping[str, Path]) -> list[str]:
    """Of `class_folders` those of classes, such as test/cat, that the first split has not."""
    first, *others = [
        {child.name: child for child in folder.iterdir() if child.is_dir()} for folder in folders.values()
    ]
    found = [child for own in others for name, child in own.items() if name not in first and name[0] != "."]
    return sorted(f"{child.parent.name}/{child.name}" for child in found)


def _find_splits(source: str) -> dict[str, Callable[[], _Rows]]:
    """The splits that there are, each as a function that finds its images: a fault in one is none of the others'."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{source}: this is a file; {_ACCEPTED}")
        return _hub_splits(source, f"{source}: no such folder")
    return _hub_splits(str(folder), source) if _has_parquet(folder) else _folder_splits(folder)


def _has_parquet(folder: Path) -> bool:
    # os.walk says nothing about a folder that it may not list; the class would just be missing.
    return any(name.endswith(".parquet") for _, _, names in os.walk(folder, onerror=_raise) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _folder_splits(folder: Path) -> dict[str, Callable[[], _Rows]]:
    splits = _split_folders(folder)
    numbering = splits.get("train") or next(iter(splits.values()))
    return {split: partial(_folder_rows, path, numbering) for split, path in splits.items()}


def _split_folders(folder: Path) -> dict[str, Path]:
    children = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    named = {
        split: children[name] for split, names in _SPLIT_NAMES.items() for name in reversed(names) if name in children
    }
    # A folder <class>/* may have a class "test": only "train", or nothing but splits, makes it a folder of splits.
    if "train" not in named and len(named) < len(children):
        named = {}
    return named or {"train": folder}


def _folder_rows(folder: Path, numbering: Path) -> _Rows:
    """The images in the class folders of `folder`, numbered by the class folders of `numbering`."""
    classes, images = _class_images(numbering)
    if folder != numbering:
        own, images = _class_images(folder)
        if unknown := sorted(set(own) - set(classes)):
            raise ValueError(f"{folder}: classes {unknown} have no training images; the training classes are {classes}")
    index = {name: i for i, name in enumerate(classes)}
    paths = [path for path, _ in images]
    return _Rows(paths, [partial(decode_file, path) for path in paths], [index[name] for _, name in images], classes)


def _class_images(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The folders directly below `folder` that have images, sorted as timm does; and each image with its folder."""
    samples, found = find_images_and_targets(str(folder), _extensions())
    names = [name for name in found if not name.startswith(".")]  # .ipynb_checkpoints is no class
    if not names:
        raise ValueError(f"{folder}: no images in class folders; {_ACCEPTED}")
    if "" in names:
        raise ValueError(f"{folder}: some images lie outside a class folder; move each to {folder}/<class>/")
    children = {child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if empty := sorted(children - set(names)):
        print(f"gzoo: {folder}: no images in the folders {empty}, so they are no classes", file=sys.stderr)
    images = [(path, name) for path, _ in samples if not (name := Path(path).parent.name).startswith(".")]
    for path, _ in images:
        inside = Path(path).relative_to(folder)
        if len(inside.parts) != 2:
            raise ValueError(
                f"{folder}: {inside} lies in a folder within a folder, so its class is unclear; images go to "
                f"<class>/*, those of splits to train/<class>/*, val/<class>/* and test/<class>/*"
            )
    if others := _other_files(folder, names):
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        print(f"gzoo: {folder}: left out as files of no format that PIL opens: {counts}", file=sys.stderr)
    return names, images


def _other_files(folder: Path, classes: list[str]) -> Counter[str]:
    """How many files in class folders are no images by their suffix, by that."""
    known, found = set(_extensions()), [entry for name in classes for entry in os.scandir(folder / name)]
    suffixes = [Path(entry.name).suffix.lower() for entry in found if entry.is_file() and entry.name[0] != "."]
    return Counter(suffix or "without an ending" for suffix in suffixes if suffix not in known)


def _extensions() -> list[str]:
    """Those of the files that PIL opens: .png, .tif ..."""
    return [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN]


def _hub_splits(source: str, complaint: str) -> dict[str, Callable[[], _Rows]]:
    """The splits of a parquet folder or a Hub dataset, through `datasets`."""
    is_folder = Path(source).is_dir()
    name_like = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not Path(source.split("/")[0]).is_dir()
    if not is_folder and not name_like:
        raise FileNotFoundError(f"{complaint}; {_ACCEPTED}")
    import datasets

    if not is_folder:
        print(f"{complaint}; looking for a dataset of that name on the Hugging Face Hub", file=sys.stderr)
    try:
        loaded = datasets.load_dataset(source)
    # Which exception a missing name, a missing network or a broken file gives has changed with every version of
    # datasets; none of them is a fault of gzoo, and all of them mean the same to the caller.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_folder:
            raise ValueError(f"{source}: its parquet files cannot be read ({reason})") from error
        raise FileNotFoundError(
            f"{complaint}, and no dataset of that name could be opened on the Hugging Face Hub ({reason}). "
            f"Check the spelling and the network; {_ACCEPTED}"
        ) from error
    found = {split: loaded[name] for split, names in _SPLIT_NAMES.items() for name in reversed(names) if name in loaded}
    if not found:
        raise ValueError(f"{source}: its splits are {list(loaded)}; none of them is train, validation or test")
    if is_folder:
        _require_same_features(Path(source))
    image, label = _columns(next(iter(found.values())).features, source)
    classes = _class_names(next(iter(found.values())), label)
    return {
        split: partial(_hub_rows, rows, image, label, classes, f"{source} {split}") for split, rows in found.items()
    }


def _require_same_features(folder: Path) -> None:
    """Raises ValueError if two files number their classes in two ways: `datasets` reads all as the first."""
    import datasets
    from pyarrow.parquet import read_schema  # type: ignore[import-untyped]

    first, *others = sorted(folder.rglob("*.parquet"))
    own, *found = (datasets.Features.from_arrow_schema(read_schema(path)) for path in (first, *others))
    for path, features in zip(others, found, strict=True):
        for name, feature in features.items():
            if isinstance(feature, datasets.ClassLabel) and feature != own.get(name):
                raise ValueError(
                    f"{path}: its column {name} has the classes {feature.names}, and that of {first.name} "
                    f"{getattr(own.get(name), 'names', None)}; write all files with one list of classes"
                )


def _columns(features: Any, source: str) -> tuple[str, str]:
    """The names of the image column and the label column."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in _LABEL_COLUMNS if name in features]
    for kind, names, preferred in (("image", images, ("image", "img")), ("label", labels, _LABEL_COLUMNS)):
        names[:] = [name for name in preferred if name in names][:1] or names
        if len(names) != 1:
            problem = f"several could be the {kind}: {names}" if names else f"none of them is the {kind}"
            raise ValueError(
                f"{source}: of the columns {list(features)} {problem}. One column of type Image and one of type "
                f"ClassLabel are needed; among several, {kind} columns named {' or '.join(preferred)} are taken."
            )
    return images[0], labels[0]


def _class_names(rows: Any, label: str) -> list[str]:
    import datasets

    feature = rows.features[label]
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        raise ValueError(
            f"the column {label!r} holds a {type(feature).__name__} for each image; one class is needed, a ClassLabel, "
            "a text or a whole number"
        )
    names = feature.names if hasattr(feature, "names") else sorted(str(v) for v in rows.unique(label) if v is not None)
    return list(names)


def _hub_rows(rows: Any, image: str, label: str, classes: list[str], where: str) -> _Rows:
    import datasets

    values = list(rows[label])
    if not hasattr(rows.features[label], "names"):
        index = {name: i for i, name in enumerate(classes)}
        values = [index.get(str(value), -1) for value in values]
    if bad := [i for i, value in enumerate(values) if value is None or not 0 <= value < len(classes)]:
        raise ValueError(f"{where}: row {bad[0]} and {len(bad) - 1} others have no label among the classes {classes}")
    encoded = rows.cast_column(image, datasets.Image(decode=False))
    decoders = [partial(_decode_row, encoded, image, i) for i in range(len(values))]
    return _Rows([f"{where} row {i}" for i in range(len(values))], decoders, values, classes)


# --- decoding -------------------------------------------------------------------------------------------------------


def decode_file(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return _decode(file)


def _decode_row(rows: Any, column: str, index: int) -> Image.Image:
    cell = rows[index][column]
    if cell["bytes"] is None:
        return decode_file(cell["path"])
    return _decode(io.BytesIO(cell["bytes"]))


def _decode(file: Any) -> Image.Image:
    """Decode to 8 bits a channel, in mode L, RGB or RGBA."""
    image = Image.open(file)
    if getattr(image, "is_animated", False):
        warnings.warn("an image file has several pages or frames, and gzoo reads the first of each", stacklevel=2)
    image.load()
    # 16 bit grey in PNG and PGM was of mode I before it was of I;16.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"its pixels are of PIL's mode {image.mode}, whose black and white are unknown; save 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # PIL's own conversion to 8 bits clips at 255
        pixels = np.asarray(image).astype(np.uint32)
        if pixels.max(initial=0) < 2**14:
            warnings.warn(
                "the largest value of an image of 16 bits is below 16384, as of a camera of 10, 12 or 14 bits; gzoo "
                "takes 65535 for white, so it is dark: scale such images to all 16 bits, or save them with 8",
                stacklevel=2,
            )
        return Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGBA" if "transparency" in image.info or image.mode in ("LA", "RGBA") else "RGB")


def _decode_all(rows: _Rows, memory_budget: int, title: str) -> tuple[list[Any], list[str]]:
    """Decode every image once: what is kept of each (None if it is unreadable), and one line a failure."""
    from tqdm import tqdm

    kept: list[Any] = []
    skipped: list[str] = []
    room = memory_budget
    bar = tqdm(total=len(rows.decoders), desc=title, unit="image", leave=False, delay=2, disable=None)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In pieces: a pool that runs ahead of this loop would hold every decoded image, whatever the budget.
        for start in range(0, len(rows.decoders), 256):
            piece = rows.decoders[start : start + 256]
            names = rows.names[start : start + 256]
            for name, decoder, result in zip(names, piece, pool.map(_try_decode, piece), strict=True):
                if isinstance(result, str):
                    skipped.append(f"{name}: {result}")
                    kept.append(None)
                    continue
                room -= result.width * result.height * len(result.getbands())
                kept.append(result if room >= 0 else decoder)
            bar.update(len(piece))
    return kept, skipped


def _try_decode(decoder: partial) -> Image.Image | str:
    try:
        return decoder()
    except Exception as error:  # PIL's plugins raise a dozen kinds on broken bytes, SyntaxError and struct.error too
        return f"{type(error).__name__}: {error}"


# --- splitting ------------------------------------------------------------------------------------------------------


def split_validation(data: ImageData, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
    """Split off `fraction` of every class, the same images for the same seed: (training, validation).

    A class of two images or more has one in each, at least.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction is {fraction}; a number above 0 and below 1 splits off a validation set")
    labels, rng = np.asarray(data.labels), np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        most = len(members) - 1
        held_out[members[: min(max(round(fraction * len(members)), 1), most)]] = True
    if not held_out.any():
        raise ValueError(
            f"{len(labels)} images in {len(data.classes)} classes leave none to validate on, as each class has one; "
            "give it more images, or val_fraction 0 to train without validation"
        )
    return data.subset(np.flatnonzero(~held_out).tolist()), data.subset(np.flatnonzero(held_out).tolist())


# --- transforms and loaders -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image. Names and meanings are those of `timm.data.create_transform`, but for five."""

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    crop_padding: int = 0  # pixels: crop from the image padded by zeros, as in CIFAR recipes, not by resizing a part
    rotate: float = 0.0  # degrees: rotate by a uniform angle in [-rotate, rotate], corners black
    zoom: tuple[float, float] | None = None  # enlarge about the centre by a uniform factor, in the same resampling
    shear: float = 0.0  # degrees: shear by a uniform angle in [-shear, shear], in the same resampling
    transpose: float = 0.0  # probability of a swap of rows and columns; with both flips at 0.5, all of p4m

    def __post_init__(self) -> None:
        if self.crop_padding and (self.scale or self.ratio):
            raise ValueError("crop_padding and scale or ratio are two ways to crop; set one of them")
        if self.color_jitter and self.auto_augment and "3a" not in self.auto_augment:
            raise ValueError("auto_augment changes colours in its own way, without color_jitter; set one of them")
        for name in ("scale", "ratio", "zoom"):
            low, high = getattr(self, name) or (1.0, 1.0)
            if low > high:
                raise ValueError(f"{name} is {low} to {high}; give the smaller number first")

    @property
    def turns_or_stretches(self) -> bool:
        return bool(self.rotate or self.zoom or self.shear)

    @property
    def resized_crop(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Area and aspect ratio of the crop where there is no `crop_padding`."""
        return self.scale or (0.35, 1.0), self.ratio or (3 / 4, 4 / 3)


def input_config(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """timm's data config of the model (input_size, mean, std, interpolation, crop_pct ...), with changes.

    A mean or std for another number of channels, which timm leaves when a model is built with other `in_chans`, becomes
    its average for each channel.
    """
    config = timm.data.resolve_model_data_config(model, args={k: v for k, v in changes.items() if v is not None})
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def eval_transform(config: dict[str, Any]) -> transforms.Compose:
    """PIL image to a normalised tensor (C, H, W), for a data config of `input_config`."""
    return transforms.Compose(
        [to_channels(config["input_size"][0]), timm.data.create_transform(**config, is_training=False)]
    )


def train_transform(config: dict[str, Any], augmentation: Augmentation) -> transforms.Compose:
    """PIL image to a randomly changed, normalised tensor (C, H, W)."""
    a, (channels, *size) = augmentation, config["input_size"]
    if a.color_jitter and channels == 4:
        raise ValueError("color_jitter changes images of 1 or 3 channels, not 4; leave it out")
    if a.auto_augment and (channels == 4 or config["interpolation"] not in ("nearest", "bilinear", "bicubic")):
        raise ValueError(
            f"auto_augment changes images of 1 or 3 channels, not {channels}, by nearest, bilinear or bicubic "
            f"interpolation, not {config['interpolation']}; leave it out"
        )
    steps: list[Any] = [to_channels(channels)]
    if a.transpose:
        steps.append(transforms.RandomApply([_transpose], a.transpose))
    if a.turns_or_stretches:
        modes = transforms.InterpolationMode  # PIL rotates by no other two; the blur of a bilinear one is felt
        mode = modes.BILINEAR if config["interpolation"] == "bilinear" else modes.BICUBIC
        steps.append(transforms.RandomAffine(a.rotate, scale=a.zoom, shear=a.shear or None, interpolation=mode))
    scale, ratio = a.resized_crop
    if a.crop_padding:
        interpolation = timm.data.transforms.str_to_interp_mode(config["interpolation"])
        steps += [transforms.Resize(min(size), interpolation), transforms.RandomCrop(size, a.crop_padding)]
        scale = ratio = (1.0, 1.0)  # timm's crop then is the whole image
    steps.append(
        timm.data.create_transform(
            input_size=config["input_size"],
            is_training=True,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            scale=scale,
            ratio=ratio,
            hflip=a.hflip,
            vflip=a.vflip,
            color_jitter=a.color_jitter,
            auto_augment=a.auto_augment,
            re_prob=a.re_prob,
        )
    )
    return transforms.Compose(steps)


def _transpose(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.TRANSPOSE)


def to_channels(channels: int) -> partial:
    """A function that gives a PIL image the channels of a model."""
    if channels not in _MODES:
        raise ValueError(f"the model takes {channels} channels; images have {' or '.join(map(str, _MODES))}")
    return partial(_convert, mode=_MODES[channels])


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image = image if image.mode == mode else image.convert(mode)
    # Where PIL resizes or turns RGBA it weighs the colours by the fourth band, which may be no opacity: near infrared,
    # say. The bands of CMYK are to it four numbers.
    return Image.merge("CMYK", image.split()) if mode == "RGBA" else image


class _Batches(Dataset):
    """Transformed batches whose random numbers depend on (seed, epoch, first image), not on who computes them.

    So the number of workers changes nothing, and a resumed run draws what the unbroken run would have drawn.
    """

    def __init__(self, data: ImageData, transform: transforms.Compose, seed: int) -> None:
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        python, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            _seed_cpu(self.seed, self.epoch, indices[0])  # a GPU's generator is dropout's
            pairs = [self.data[i] for i in indices]
            images = torch.stack([self.transform(image) for image, _ in pairs])  # (B, C, H, W)
        random.setstate(python)
        np.random.set_state(numpy_state)
        return images, torch.tensor([label for _, label in pairs])


class _Order(torch.utils.data.Sampler):
    """A new order every epoch, from (seed, epoch) alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist())


def train_loader(
    data: ImageData, transform: transforms.Compose, batch_size: int, seed: int, workers: int, device: torch.device
) -> DataLoader:
    """Batches in random order; a last incomplete one is left out. Call `set_epoch` before each epoch."""
    return shuffled(_Batches(data, transform, seed), batch_size, seed, workers, device.type == "cuda")


def shuffled(
    batches: Any, batch_size: int, seed: int, workers: int = 0, pin_memory: bool = False
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader in random order of a data set that makes whole batches, as `_Batches` does."""
    return DataLoader(
        batches,
        min(batch_size, len(batches)),
        sampler=_Order(len(batches), seed),
        drop_last=True,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin_memory,
    )


def eval_loader(
    data: ImageData, transform: transforms.Compose, batch_size: int, workers: int, device: torch.device
) -> DataLoader:
    """Batches in the order of the data, all of it."""
    return DataLoader(
        _Batches(data, transform, 0),
        batch_size,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=device.type == "cuda",
    )


def set_epoch(loader: DataLoader, epoch: int) -> None:
    loader.dataset.epoch = loader.sampler.epoch = epoch  # type: ignore[attr-defined]


def seed_everything(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators from a few whole numbers."""
    torch.manual_seed(_seed_cpu(*numbers))


def _seed_cpu(*numbers: int) -> int:
    """Seed what draws on the CPU, and no GPU's generator; the one seed that the numbers make."""
    seed = mixed_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


def mixed_seed(*numbers: int) -> int:
    """One seed from a few whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _same(batch: Any) -> Any:
    return batch  # _Batches stacks a batch itself


# --- rotated MNIST --------------------------------------------------------------------------------------------------


def make_rotated_mnist(
    source: str, out: str, seed: int = 20161, train_rows: int = 12_000, more_test_rows: int = 40_000
) -> dict[str, int]:
    """Write rotated MNIST as `out/train.parquet` and `out/test.parquet`, in the Hub's format.

    Training and validation: the first 12,000 rows of MNIST's training set. Test: MNIST's 10,000 test rows, then the
    next 40,000 rows of its training set. The images, in this order, are rotated about their centre by angles that are
    drawn at once from `numpy.random.default_rng(seed).uniform(0, 360)`; PIL, bicubic, black corners, still 28x28.

    Returns:
        the number of images in each file.

    Raises:
        FileExistsError: ``out`` is a folder that is not empty, whose images would mix with these.
    """
    import datasets

    if os.path.isdir(out) and os.listdir(out):
        raise FileExistsError(f"{out} is not an empty folder; give another --out")
    train, test = open_split(source, "train"), open_split(source, "test")
    if len(train) < train_rows + more_test_rows:
        raise ValueError(f"{source}: {len(train)} training images; {train_rows + more_test_rows} are needed")
    pairs = [train[i] for i in range(train_rows)]
    pairs += [test[i] for i in range(len(test))]
    pairs += [train[i] for i in range(train_rows, train_rows + more_test_rows)]
    angles = np.random.default_rng(seed).uniform(0, 360, len(pairs))
    cells = [
        {"bytes": _png(image.convert("L").rotate(angle, Image.Resampling.BICUBIC)), "path": None}
        for (image, _), angle in zip(pairs, angles.tolist(), strict=True)
    ]
    labels = [label for _, label in pairs]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=train.classes)})
    os.makedirs(out, exist_ok=True)
    sizes = {}
    for name, rows in (("train", slice(0, train_rows)), ("test", slice(train_rows, None))):
        table = datasets.Dataset.from_dict({"image": cells[rows], "label": labels[rows]}, features=features)
        written = io.BytesIO()
        table.to_parquet(written)
        write_atomically(Path(out) / f"{name}.parquet", written.getvalue())
        sizes[name] = len(table)
    return sizes


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
