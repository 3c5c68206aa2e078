"""The tour runs offline, from the command line, and leaves its picture."""

import functools

from PIL import Image

from gzoo import demo
from gzoo.cli import main


def test_the_demo_prints_its_tables_and_draws_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images, labels = demo._digits()
    monkeypatch.setattr(demo, "_digits", lambda: (images[:100], labels[:100]))
    monkeypatch.setattr(demo, "_fine_tune", functools.partial(demo._fine_tune, per_class=8))
    assert main(["demo", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if ".rotmnist" in line}
    assert rows["p4_cnn7.rotmnist"][9] == "100.0%"  # the same answer under the four turns
    assert rows["p4m_cnn7.rotmnist"][10] == "100.0%"  # and in all eight poses
    assert float(rows["cnn7.rotmnist"][9].rstrip("%")) < 100
    assert "still equivariant" in said
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size[0] > 1000
