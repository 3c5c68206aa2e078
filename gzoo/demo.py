"""The tour: what equivariance buys, on real digits, in a table and a picture; then a short fine-tuning. Offline."""

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from gzoo import groups
from gzoo.check import check
from gzoo.train import TrainConfig, train

_MODELS = ("cnn7.rotmnist", "p4_cnn7.rotmnist", "p4m_cnn7.rotmnist")
_SQUARE = groups.get("p4m")


def demo(out: str) -> None:
    """Prints the tour and writes ``{out}/digits.png``.

    Args:
        out: folder for the picture; made if needed.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = _digits()
    models = {name: timm.create_model(name, pretrained=True).eval() for name in _MODELS}
    predictions = {name: _predict(model, images) for name, model in models.items()}

    print(f"{len(labels)} handwritten digits (scikit-learn's), each in the eight poses of the square.")
    print("Three networks of 25 thousand weights, trained alike on rotated MNIST: plain, over p4, over p4m.\n")
    print(_table(predictions, labels))
    print("\nWhen the image turns, p4_cnn7 never changes its answer; nor does p4m_cnn7, also in the mirror. The plain")
    print("network saw every rotation in training and still does. (None of them ever saw a digit of this data set.)\n")
    print(check(models["p4m_cnn7.rotmnist"], size=28))
    _draw(predictions, images, labels, folder / "digits.png")
    print(f"\npicture: {folder / 'digits.png'}\n")
    _fine_tune(images, labels)


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits drawn like MNIST: (1797, 1, 28, 28) in 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # 8x8 pixels
    enlarged = nn.functional.interpolate(small, 18, mode="bicubic")
    sharpened = (2 * enlarged - 0.5).clamp(0, 1)  # MNIST is nearly black and white
    return nn.functional.pad(sharpened, 4 * (5,)), torch.from_numpy(digits.target)


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every image in every pose: (|G|, images)."""
    config = model.pretrained_cfg
    x = (images - config["mean"][0]) / config["std"][0]  # type: ignore[index]
    return torch.stack([model(_SQUARE.transform_image(x, g)).argmax(1) for g in range(_SQUARE.order)])


def _table(predictions: dict[str, Tensor], labels: Tensor) -> str:
    poses = "".join(f"{_SQUARE.label(g):>10}" for g in range(_SQUARE.order))
    lines = [f"{'accuracy in %':<20}{poses}{'mean':>10}{'same under 4 turns':>20}{'in all 8 poses':>16}"]
    for name, classes in predictions.items():
        accuracy = 100 * (classes == labels).float().mean(1)
        turned = 100 * (classes[:4] == classes[0]).all(0).float().mean()
        posed = 100 * (classes == classes[0]).all(0).float().mean()
        cells = "".join(f"{value:10.1f}" for value in accuracy)
        lines.append(f"{name:<20}{cells}{accuracy.mean():10.1f}{turned:19.1f}%{posed:15.1f}%")
    return "\n".join(lines)


def _draw(predictions: dict[str, Tensor], images: Tensor, labels: Tensor, path: Path) -> None:
    """Digits on which the plain network changes its mind, in the eight poses, with all answers."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    plain, equivariant = predictions["cnn7.rotmnist"], predictions["p4m_cnn7.rotmnist"]
    steady = (equivariant == labels).all(0)
    fickle = (plain != plain[0]).sum(0) * steady
    shown = fickle.argsort(descending=True, stable=True)[:4]
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    figure.suptitle("One digit, eight poses. Below each: what cnn7 | p4_cnn7 | p4m_cnn7 read")
    for row, axes in zip(shown.tolist(), figure.subplots(len(shown), _SQUARE.order), strict=True):
        for g, axis in enumerate(axes):
            axis.imshow(_SQUARE.transform_image(images[row, 0], g).numpy(), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
            answers = [classes[g, row].item() for classes in predictions.values()]
            right = answers[0] == labels[row]
            axis.set_xlabel(" | ".join(map(str, answers)), color="black" if right else "crimson", fontsize=13)
            if row == shown[0]:
                axis.set_title(_SQUARE.label(g), fontsize=10)
    figure.savefig(path, dpi=110)


def _fine_tune(images: Tensor, labels: Tensor, classes: int = 2, per_class: int = 32) -> None:
    """Fine-tunes p4m_resnet20 on a folder of images for a few steps and loads the result again."""
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "digits")
        for digit in range(classes):
            (data / str(digit)).mkdir(parents=True)
            for i in (labels == digit).nonzero()[:per_class, 0].tolist():
                pixels = (255 * images[i, 0]).numpy().astype(np.uint8)
                Image.fromarray(pixels).save(data / str(digit) / f"{i}.png")
        run = Path(temporary, "run")
        print(f"fine-tuning p4m_resnet20 on a folder of {classes * per_class} images in {classes} classes:")
        train(
            TrainConfig(
                model="p4m_resnet20",
                data=str(data),
                out=str(run),
                epochs=10,
                batch_size=8,
                optimizer={"name": "adamw", "lr": 3e-3, "weight_decay": 0.05},
                image_size=16,
                val_fraction=0.25,
                hflip=0.0,
            )
        )
        model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
        print("\nloaded again with timm.create_model('local-dir:...'), and still equivariant:")
        print(check(model, size=(32, 33)))
