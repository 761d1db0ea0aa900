"""The README's tables are those that the committed runs give."""

from scripts.report import BLOCK, README, fill


def test_readme_is_up_to_date():
    text = README.read_text()
    assert len(BLOCK.findall(text)) >= 1
    assert fill(text) == text


def test_a_changed_figure_is_noticed():
    text = README.read_text()
    assert fill(text.replace("| 0 of 1000 |", "| 1 of 1000 |", 1)) == text
    assert text.replace("| 0 of 1000 |", "| 1 of 1000 |", 1) != text
