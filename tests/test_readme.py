"""The README's Python runs as printed, and its tables are those of the result files."""

import re
from pathlib import Path

import pytest

from gzoo.card import leaderboard

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet {i}" for i in range(len(SNIPPETS))])
def test_readme_snippets_print_what_they_say(snippet, capsys):
    said = re.findall(r"print\(.*# (True|False)", snippet)
    exec(snippet, {})
    assert capsys.readouterr().out.split() == said


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 2


def test_readme_shows_the_leaderboard_of_the_cards():
    shown = re.search(r"<!-- leaderboard -->\n(.*?)\n<!-- /leaderboard -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == leaderboard()
