"""Winograd's convolution is the convolution, forward and backward, and stands in where it applies."""

import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from gzoo import check, winograd
from gzoo.winograd import Winograd

SIZES = [(8, 8), (7, 9), (4, 13), (1, 1), (3, 8)]


@pytest.fixture
def eager(monkeypatch):
    """The transforms as they are written; torch.compile would take half a minute for each shape."""
    monkeypatch.setattr(winograd, "_compiled", lambda function, kernel, shape: function)


@pytest.fixture
def calls(eager, monkeypatch):
    """The shapes of the images that Winograd's convolution was called with."""
    shapes, apply = [], winograd._Convolution.apply

    def counted(x, weight):
        shapes.append(tuple(x.shape))
        return apply(x, weight)

    monkeypatch.setattr(winograd._Convolution, "apply", counted)
    return shapes


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_convolution(size, kernel, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)
    y, expected = winograd._Convolution.apply(x, weight), F.conv2d(x, weight, padding=kernel // 2)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)
    gradient = torch.randn_like(y)
    made = torch.autograd.grad(y, (x, weight), gradient)
    for of_this, of_torch in zip(made, torch.autograd.grad(expected, (x, weight), gradient), strict=True):
        torch.testing.assert_close(of_this, of_torch, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=frozen != "x")
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=frozen != "weight")
    winograd._Convolution.apply(x, weight).sum().backward()
    assert (x.grad is None, weight.grad is None) == (frozen == "x", frozen == "weight")


@pytest.mark.parametrize(
    ("layer", "image", "taken"),
    [
        (nn.Conv2d(32, 40, 3, padding=1), (2, 32, 8, 9), True),
        (nn.Conv2d(32, 40, 3, padding=1, bias=False), (2, 32, 8, 9), True),
        (nn.Conv2d(32, 40, 5, padding=2), (2, 32, 8, 9), True),
        (nn.Conv2d(32, 32, 3), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 32, 5, padding=1), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 32, 7, padding=3), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 32, (3, 5), padding=(1, 2)), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 32, 3, padding="same"), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 32, 3, padding=1, stride=2), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 32, 3, padding=1, dilation=2), (2, 32, 8, 8), False),
        (nn.Conv2d(64, 64, 3, padding=1, groups=2), (2, 64, 8, 8), False),
        (nn.Conv2d(32, 32, 1), (2, 32, 8, 8), False),
        (nn.Conv2d(32, 31, 3, padding=1), (2, 32, 8, 8), False),
        (nn.Conv2d(31, 32, 3, padding=1), (2, 31, 8, 8), False),
        (nn.Conv2d(32, 32, 3, padding=1), (32, 8, 8), False),
        (nn.Conv2d(32, 32, 3, padding=1).double(), (2, 32, 8, 8), False),
    ],
)
def test_it_stands_in_for_those_convolutions_that_it_can_do(layer, image, taken, calls):
    x = torch.randn(image, dtype=layer.weight.dtype)
    expected = layer(x)
    with Winograd():
        y = layer(x)
    assert calls == [image] * taken
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 if taken else 0)
    layer(x)
    assert len(calls) == taken  # and only while it is entered


def test_it_leaves_autocast_alone(calls):
    layer, x = nn.Conv2d(32, 32, 3, padding=1), torch.randn(2, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with Winograd():
            assert layer(x).equal(expected)
    assert not calls


@pytest.mark.parametrize(
    ("name", "shape", "widths"),
    [("p4m_resnet20", (3, 17, 17), {88, 184, 360}), ("c8_cnn6", (1, 28, 28), {96, 144, 192})],
)
def test_a_network_keeps_its_gradients_and_its_symmetry(name, shape, widths, calls):
    model = timm.create_model(name, num_classes=3)
    x, labels = torch.randn(4, *shape), torch.tensor([0, 1, 2, 0])
    parameters = list(model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters)
    with Winograd():
        made = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters)
        assert check(model, shape[1:], dtype=torch.float32).worst <= 1e-5
    assert {image[1] for image in calls} == widths
    largest = max(gradient.abs().max() for gradient in expected)
    for gradient, other in zip(made, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-4 * largest)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kernel", [3, 5])
def test_the_compiled_transforms_are_those(kernel):
    x = torch.randn(2, 32, 9, 8, requires_grad=True)
    weight = torch.randn(32, 32, kernel, kernel, requires_grad=True)
    expected = F.conv2d(x, weight, padding=kernel // 2)
    gradient = torch.randn_like(expected)
    references = torch.autograd.grad(expected, (x, weight), gradient)
    with Winograd():
        y = F.conv2d(x, weight, None, 1, kernel // 2, 1, 1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    for made, reference in zip(torch.autograd.grad(y, (x, weight), gradient), references, strict=True):
        torch.testing.assert_close(made, reference, rtol=1e-4, atol=1e-3)
