"""timm's convolutional networks, at large: a sample in every run, all of them and all of the zoo in the slow one."""

import os
import re
from pathlib import Path

import pytest
import timm

from gzoo import coverage
from gzoo.cli import main
from gzoo.convert import convert_in_place, randomized
from gzoo.registry import ENTRIES

# The smallest of each family, and what their rules are for. Left out: SelecSLS, CSPNeXt, FasterNet, HGNet, RegNet-Z,
# ResNetV2, ReXNet and SKNet, which need no rule of their own, and what other tests convert: DenseNet, Res2Net and
# attention between channels, of which thin networks are built in tests/test_plan.py and tests/test_transfer.py, DLA,
# DPN, GhostNet, HRNet, MixNet and MobileNetV3, which the former builds, and RepVGG, RepGhost, LCNetV2, MobileOne,
# FastViT and RepViT of tests/test_reparameterize.py.
SAMPLE = (
    *("test_byobnet", "cs3darknet_focus_s", "poolformerv2_s12", "edgenext_xx_small", "test_efficientnet"),
    *("tf_efficientnet_lite0", "efficientvit_b0", "mobilevit_xxs", "inception_next_atto", "test_mambaout"),
    *("resnest14d", "test_resnet", "test_nfnet", "starnet_s050", "ese_vovnet19b_slim_dw", "convnextv2_atto"),
)

REFUSED = {
    "resnet50_clip": r"head is a timm.layers.attention_pool2d.AttentionPool2d with parameters or buffers of its own "
    r"\(pos_embed\)",
    "efficientformerv2_s0": "its channels come out of 'matmul'",
    "bat_resnext26ts": r"attn\.ba\.conv_p: kernel_size=\(8, 1\) .* makes the map smaller along one axis only",
    "pnasnet5large": r"pads \(-1, 1, -1, 1\) pixels .* a shift of the map has no counterpart",
    "nasnetalarge": "a shift of the map has no counterpart",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_of_timm_converts_trains_and_is_exact(name):
    assert coverage.measure("", name, 1, "p4").reason == ""


@pytest.mark.parametrize(
    ("name", "group"),
    [
        *(("test_efficientnet", group) for group in ("c8", "d3", "p4m")),
        *(("test_convnext", group) for group in ("d3", "d8")),
    ],
)
def test_it_does_over_other_groups(name, group):
    assert coverage.measure("", name, 1, group).reason == ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_convert_says_why(name):
    reason = coverage.measure("", name, 1, "p4").reason
    assert re.search(REFUSED[name], reason), reason


def test_a_network_that_gives_features_is_measured_as_a_map_that_moves(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, num_classes=0, global_pool=""))
    row = coverage.measure("", "test_resnet", 1, "p4")
    assert (row.reason, row.error < 1e-12) == ("", True)


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(
        coverage, "measure", lambda *row: measured.append(row[1]) or coverage.Row(*row, 1.0, 1e-15, 0.1, "")
    )
    rows = coverage.architectures(("starnet",), 3e6)
    out = tmp_path / "coverage.csv"
    coverage.coverage(rows[:2], "p4", out)
    assert coverage.coverage(rows, "p4", out) == coverage.read(out)
    assert measured == [name for _, name, _ in rows]
    assert main(["coverage", "--module", "starnet", "--most-params", "3e6", "--out", str(out)]) == 0
    assert f"{len(rows)}/{len(rows)}" in capsys.readouterr().out
    for group, message in (("c8", f"{out} has rows over p4; give another --out for those over c8"), ("p5", "p5")):
        assert main(["coverage", "--group", group, "--module", "starnet", "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert len(measured) == len(rows)


def test_an_unknown_module_of_timm_is_named(tmp_path, capsys):
    assert main(["coverage", "--module", "nope", "--out", str(tmp_path / "c.csv")]) == 1
    assert "timm has no architectures in ['nope']" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.group], ids=lambda entry: entry.name)
def test_every_entry_is_exact(entry):
    probe, x = randomized(timm.create_model(entry.name))
    assert max(coverage._errors(probe, x)) < coverage.TOLERANCE


@pytest.mark.slow
def test_nine_of_ten_networks_convert():
    """Goes on in the file that GZOO_COVERAGE names, for it takes hours."""
    rows = coverage.coverage(coverage.architectures(), "p4", Path(os.environ.get("GZOO_COVERAGE", "coverage.csv")))
    assert sum(not row.reason for row in rows) / len(rows) >= 0.9


def test_a_converted_network_keeps_its_logits_apart():
    probe, x = randomized(convert_in_place(timm.create_model("test_resnet"), "p4"))
    assert (probe(x) - probe(x.flip(-1) * 2)).abs().max() > 1e-3
