"""The twins that `gzoo bench` compares with are the networks they are said to be, and its report is complete."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from gzoo import _escnn, bench, cli, winograd
from gzoo.bench import Case, EscnnLayer, escnn_twin, plain_twin
from gzoo.check import relative_error
from gzoo.equivariant import group_of
from gzoo.nn import FibreNorm, GroupConv2d, LiftingConv2d, SymmetricPool2d

SMALL = "p4_resnet20"


@pytest.fixture(scope="module")
def model():
    return timm.create_model(SMALL)


@pytest.fixture(scope="module")
def twin(model):
    """Of escnn, which takes seconds to build."""
    return escnn_twin(model)


@pytest.fixture(scope="module")
def report():
    """Of a run without the fresh processes, which take seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_in_fresh_process", in_this_process)
        patch.setattr(bench, "_STATUS", Path("no such file"))  # here memory has had its peak already
        return bench.bench([Case(SMALL, 9)], batch_size=2, threads=1, rounds=3, processes=1)


def in_this_process(code, *arguments, environment=None):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["-c", json.dumps(arguments)])
        exec(code, {})
    return json.loads(printed.getvalue())


def layers(network, *types):
    return [module for module in network.modules() if isinstance(module, types)]


def randomized(network):
    """Fresh batch norms are the same for all channels, which is symmetric by chance."""
    with torch.no_grad():
        for norm in layers(network, nn.BatchNorm2d, nn.BatchNorm3d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return network.eval()


def test_twins_take_the_same_images_to_the_same_shapes(twin, model):
    x = torch.randn(2, 3, 32, 32)
    for network in (twin, plain_twin(model)):
        assert network(x).shape == model(x).shape
        assert network.forward_features(x).shape == model.forward_features(x).shape
        assert not layers(network, LiftingConv2d, GroupConv2d, FibreNorm, SymmetricPool2d)


def test_the_plain_twin_has_the_expanded_filters(model):
    plain = layers(plain_twin(model), nn.Conv2d)
    ours = layers(model, LiftingConv2d, GroupConv2d)
    assert [conv.weight.shape for conv in plain] == [conv.filter().shape for conv in ours]
    assert [conv.stride for conv in plain] == [conv.stride for conv in ours]


def test_the_plain_twin_is_not_invariant(model):
    network = randomized(plain_twin(model))
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        assert relative_error(network(x.rot90(1, (2, 3))), network(x)) > 1e-3


def test_the_escnn_twin_has_the_same_fields(twin, model):
    enn = _escnn.load().nn
    assert all(isinstance(layer.module, enn.R2Conv | enn.InnerBatchNorm) for layer in layers(twin, EscnnLayer))
    convolutions = [layer.module for layer in layers(twin, EscnnLayer) if isinstance(layer.module, enn.R2Conv)]
    ours = layers(model, LiftingConv2d, GroupConv2d)
    assert [conv.out_type for conv in convolutions] == [conv.out_type for conv in ours]


def test_the_escnn_twin_is_invariant_where_its_strides_fit(twin):
    network = randomized(twin)
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        assert relative_error(network(x.rot90(1, (2, 3))), network(x)) < 1e-4


def test_twins_keep_pools_and_leave_the_model_as_it_is():
    model = timm.create_model("p4_resnet18", num_classes=3)
    plain = plain_twin(model)
    assert type(plain.maxpool) is nn.MaxPool2d
    assert isinstance(model.maxpool, SymmetricPool2d)
    assert plain(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_a_plain_network_is_refused():
    with pytest.raises(ValueError, match="not equivariant"):
        plain_twin(timm.create_model("resnet20"))


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (Case("resnet20", 9), {}, "is not equivariant; bench compares models"),
        (Case("d8d4d1_resnet20", 32), {}, "changes its group between stages"),
        (Case("p4_cnn7", 8), {}, "p4_cnn7 takes no images of 8x8 pixels"),
        (Case("p4m_unet", 16), {}, "p4m_unet is no classifier of images"),
        (Case("p4m_resnet4", 32), {}, "p4m_resnet4: no such model"),
        (Case(SMALL, 9), {"processes": 0}, "processes is 0; the least is 1"),
        (Case(SMALL, 9), {"device": "tpu"}, "device is 'tpu'; it is cpu, or cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(case, options, message):
    with pytest.raises(ValueError, match=message):
        bench.bench([case], **options)


def test_steps_are_timed_in_turns_and_the_first_one_changes():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = bench._in_turns(steps, 3, "cpu")
    assert [len(times) for times in taken.values()] == [3, 3, 3]
    assert "".join(order[6:]) == "abcbcacab"  # after two rounds to warm up


def test_a_training_step_changes_the_weights_and_trains_all_of_them(model):
    network = plain_twin(model)
    before = network.head.fc.bias.detach().clone()
    bench._train_step(network, torch.randn(2, 3, 9, 9))()
    assert not torch.equal(network.head.fc.bias, before)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_report_is_json_and_holds_every_measure(report):
    assert json.loads(json.dumps(report)) == report
    assert {"machine", "versions", "targets", "import_s", "load_average"} <= report.keys()
    assert report["versions"].keys() == {"python", "gzoo", "escnn", "timm", "torch"}
    (case,) = report["cases"]
    assert (case["model"], case["size"]) == (SMALL, 9)
    for measure in ("train_ms", "eval_ms", "construction_s"):
        for library in ("gzoo", "escnn", "plain"):
            spread = case[measure][library]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert case[measure]["ratio"].keys() == {"escnn", "plain"}


def test_construction_leaves_no_cache_in_escnns_package():
    import joblib

    memory = joblib.Memory
    with bench._empty_escnn_cache():
        assert joblib.Memory("/nowhere").location != "/nowhere"
    assert joblib.Memory is memory


@pytest.mark.skipif(not bench._STATUS.exists(), reason="the peak of memory is read from /proc")
def test_a_fresh_process_measures_its_own_peak_of_memory():
    call = bench._CALL.format("peak_memory_mb")
    peak = bench._in_fresh_process(call, "gzoo", SMALL, 40, 8, 1, "cpu")
    weights = sum(parameter.numel() for parameter in timm.create_model(SMALL).parameters()) * 4 / 2**20
    images = 8 * 32 * 40 * 40 * 4 / 2**20  # one map of the first stage
    assert weights + 10 * images < peak < 4000


def test_an_error_in_a_fresh_process_is_reported():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bench._in_fresh_process("1 / 0")


def test_the_table_marks_a_missed_target(report):
    assert bench._ratio(1.2, 1.1) == "1.200 (<= 1.1 !)"
    assert bench._ratio(1.0, 1.1) == "1.000 (<= 1.1)"
    assert bench._ratio(1.0, None) == "1.000"
    for measure in ("train_ms", "eval_ms", "construction_s", "import gzoo"):
        assert measure in bench.table(report)


def test_under_winograd_steps_have_its_convolutions(monkeypatch):
    monkeypatch.setattr(winograd, "_compiled", lambda function, kernel, shape: function)  # which takes a minute
    layer, x, results = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 8, 8), []
    bench._under_winograd(lambda: results.append(layer(x)))()
    assert not results[0].equal(layer(x))
    torch.testing.assert_close(results[0], layer(x), rtol=1e-4, atol=1e-4)


def test_winograd_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="winograd is for CPUs, and device is 'cuda'"):
        bench.bench([Case(SMALL, 9)], device="cuda", winograd=True)


def test_the_command_prints_the_table_and_writes_the_json(report, tmp_path, monkeypatch, capsys):
    seen = {}

    def measured(cases, *options, say, winograd):
        seen["cases"], seen["options"] = list(cases), options
        return report

    monkeypatch.setattr(bench, "bench", measured)
    assert cli.main(["bench", "--threads", "1", "--json", str(tmp_path / "bench.json")]) == 0
    assert seen["cases"] == list(bench.CASES)
    assert "gzoo / escnn" in capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["cases"] == report["cases"]
    assert written["command"].startswith("gzoo bench --threads 1")
    assert cli.main(["bench", "--model", SMALL, "--size", "9"]) == 0
    assert seen["cases"] == [Case(SMALL, 9)]


def test_cases_are_equivariant_models():
    assert all(group_of(timm.create_model(case.model)) for case in bench.CASES)


def test_costs_of_models_are_measured_at_the_size_of_their_images(monkeypatch):
    asked = []
    monkeypatch.setattr(
        bench, "_in_fresh_process", lambda code, *step, environment=None: asked.append((code, step)) or 500.0
    )
    report = bench.costs(["p4_cnn7", "cnn7"], batch_size=8, threads=1)
    assert report["models"]["cnn7"] == {"images_per_second": 16.0, "training_memory_mb": 500.0}
    assert [step[-4:] for _, step in asked] == [(28, 8, 1, "cpu")] * 4
    monkeypatch.undo()
    assert bench.evaluation_ms("p4_cnn7", 28, 2, 1, "cpu") > 0
