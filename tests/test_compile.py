"""Equivariant models compile without a graph break, and export."""

import copy
import shutil

import onnxruntime
import pytest
import timm
import torch
from timm.utils.onnx import onnx_export
from torch import nn

import gzoo
from gzoo.check import in_channels
from tests.conftest import shallow, with_random_statistics

NAMES = ("p4_resnet20", "p4_cnn7", "p4m_convnext_atto")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_and_image(name: str):
    model = with_random_statistics(timm.create_model(name, num_classes=3, **shallow(name))).float().eval()
    return model, torch.randn(2, in_channels(model), 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_compiles_to_one_graph_in_eval(name):
    model, x = model_and_image(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_model_compiles_to_one_graph_in_training(name):
    model, x = model_and_image(name)
    model.train()
    reference = copy.deepcopy(model)
    # aot_eager also traces the backward pass, but takes three times as long: the smallest model stands for all.
    backend = "aot_eager" if name == "p4_cnn7" else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x).square().sum().backward()
    reference(x).square().sum().backward()
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_a_compiled_model_follows_its_weights():
    model, x = model_and_image("p4_cnn7")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        model.stem[0].weight.add_(0.5)
        after = compiled(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_model_compiles_with_the_default_compiler():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, x = gzoo.convert(plain, "p4").eval(), torch.randn(1, 1, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_exports(name):
    model, x = model_and_image(name)
    exported = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)


ANY_BATCH = {0: torch.export.Dim("batch", min=1, max=64)}
ANY_SIZE = {2 + i: 32 * torch.export.Dim(name, min=1, max=64) for i, name in enumerate(("height", "width"))}


def test_a_model_exports_for_any_batch_and_any_size_that_its_strides_divide():
    (model, _), x = model_and_image("p4_resnet20"), torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=(ANY_BATCH | ANY_SIZE,)).module()
    for images in (x[:1], torch.randn(1, 3, 32, 96), torch.randn(1, 3, 96, 32)):
        with torch.no_grad():
            torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_traced_model_is_of_one_size(recwarn):
    (model, _), x = model_and_image("p4_resnet20"), torch.randn(1, 3, 33, 32)
    traced = torch.jit.trace(model, x)  # warns of each number that it keeps
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(torch.jit.Error, match="the network was traced at another size of images"):
        traced(x[:, :, :32])


def assert_onnx_runtime_gives_the_same(file, model, *batches):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for images in batches:
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-4)


def test_onnx_runtime_gives_the_same_for_any_batch_size(tmp_path):
    plain = timm.create_model("test_efficientnet", num_classes=3)
    model, x = with_random_statistics(gzoo.convert(plain, "c8")).float().eval(), torch.randn(2, 3, 32, 32)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes=(ANY_BATCH,), verbose=False)
    assert_onnx_runtime_gives_the_same(file, model, x, x[:1])


def test_timms_exporter_traces_a_network_with_gradients(tmp_path, recwarn):
    model, x = model_and_image("p4_cnn7")
    onnx_export(model, tmp_path / "model.onnx", example_input=x, use_dynamo=False)
    assert_onnx_runtime_gives_the_same(tmp_path / "model.onnx", model, x)
