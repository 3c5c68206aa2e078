"""Detectors give a table, (B, rows, numbers), with a row for each anchor of each pixel: as the image turns, rows change
places, and what they say stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gzoo
from gzoo import groups
from tests.conftest import with_random_statistics

CLASSES, ANCHORS = 5, 3


def block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def per_pixel(y: Tensor, numbers: int) -> Tensor:
    return y.permute(0, 2, 3, 1).reshape(len(y), -1, numbers)


def per_anchor(y: Tensor, numbers: int) -> Tensor:
    batch, _, height, width = y.shape
    return y.view(batch, -1, numbers, height, width).permute(0, 1, 3, 4, 2).reshape(batch, -1, numbers)


def flattened(y: Tensor, numbers: int) -> Tensor:
    return y.permute(0, 2, 3, 1).contiguous().view(len(y), -1)


class Detector(nn.Module):
    """Two scales, with heads of their own or shared ones."""

    def __init__(self, rows, end, shared: bool) -> None:
        super().__init__()
        self.rows, self.end = rows, end
        self.fine, self.coarse = nn.Sequential(block(3, 16), block(16, 16)), block(16, 16)
        heads = 1 if shared else 2
        self.scores = nn.ModuleList(nn.Conv2d(16, ANCHORS * CLASSES, 3, padding=1) for _ in range(heads))
        self.boxes = nn.ModuleList(nn.Conv2d(16, ANCHORS * 4, 3, padding=1) for _ in range(heads))

    def forward(self, x: Tensor):
        fine = self.fine(x)
        maps = [fine, self.coarse(fine)]
        made = []
        for heads, numbers in ((self.scores, CLASSES), (self.boxes, 4)):
            each = [self.rows(heads[i % len(heads)](y), numbers) for i, y in enumerate(maps)]
            made.append(torch.cat(each, 1).view(len(x), -1, numbers))
        return self.end(*made)


ENDS = {
    "two tables": lambda scores, boxes: (scores, boxes),
    "a dictionary with probabilities": lambda scores, boxes: {"scores": F.softmax(scores, -1), "boxes": boxes},
    "one table": lambda scores, boxes: torch.cat([boxes, scores.sigmoid()], -1),
}


def tables(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
    return [y] if isinstance(y, Tensor) else list(y.values() if isinstance(y, dict) else y)


def in_order(rows: Tensor) -> Tensor:
    """One image's rows, sorted by their lengths."""
    return rows[0][rows[0].square().sum(1).argsort()]


@pytest.mark.parametrize(("rows", "end"), list(zip((per_pixel, per_anchor, flattened), ENDS, strict=True)))
@pytest.mark.parametrize(("group", "weights"), [("p4", None), ("c8", None), ("p4m", "transfer")])
def test_the_rows_of_detectors_change_places(rows, end, group, weights):
    plain = Detector(rows, ENDS[end], shared=rows is per_anchor).eval()
    model = with_random_statistics(gzoo.convert(plain, group, weights=weights)).eval()
    plain.double()
    for size in ((33, 33), (32, 48)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        upright = tables(model, x)
        assert [y.shape for y in upright] == [y.shape for y in tables(plain, x)]
        for g in model.group.grid_generators:
            for y, turned in zip(upright, tables(model, model.group.transform_image(x, g)), strict=True):
                torch.testing.assert_close(in_order(turned), in_order(y), rtol=0, atol=1e-11)
                assert (y - turned).abs().max() > 1e-3
    assert gzoo.check(model, (32, 48)).worst < 1e-12


def test_the_sides_of_boxes_in_rows_turn_with_the_image():
    plain = Detector(per_anchor, ENDS["two tables"], shared=True)
    sides = [tuple(range(4 * i, 4 * i + 4)) for i in range(ANCHORS)]
    model = with_random_statistics(gzoo.convert(plain, "p4m", vectors={"boxes.0": sides})).eval()
    p4m, x = groups.get("p4m"), torch.randn(1, 3, 33, 33, dtype=torch.float64)
    scores, boxes = tables(model, x)
    for g in range(p4m.order):
        other, turned = tables(model, p4m.transform_image(x, g))
        torch.testing.assert_close(in_order(other), in_order(scores), rtol=0, atol=1e-11)
        expected = p4m.transform_vectors(in_order(boxes)[..., None, None], g, [(0, 1, 2, 3)])[..., 0, 0]
        torch.testing.assert_close(in_order(turned), expected, rtol=0, atol=1e-11)
    assert gzoo.check(model, (32, 48)).worst < 1e-12


def grid_added(y: Tensor, numbers: int) -> Tensor:
    """Predictions with the place of their pixel, which is no prediction of a turned image."""
    rows = per_pixel(y, numbers)
    return rows + torch.linspace(0, 1, rows.shape[1])[:, None].to(rows)


def test_rows_that_know_their_place_are_refused():
    with pytest.raises(ValueError, match=r"the output\[0\] of EquivariantDetector is not equivariant under p4"):
        gzoo.convert(Detector(grid_added, ENDS["two tables"], shared=True), "p4")


def test_the_check_measures_how_far_rows_are_from_those_of_the_turned_image():
    model = gzoo.convert(Detector(per_pixel, ENDS["one table"], shared=True), "p4").double().eval()
    assert gzoo.check(model, 33).worst < 1e-12
    model.register_forward_hook(lambda module, inputs, y: y * torch.linspace(1, 2, y.shape[1])[:, None].to(y))
    assert gzoo.check(model, 33).worst > 1e-2
