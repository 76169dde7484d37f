"""What commands print: values as they are, whatever they contain, and JSON that a script can read."""

from __future__ import annotations

import json

import pytest

from isthmus.terminal import show_record, show_table


def test_a_cell_that_looks_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("things", [{"name": "[/x] [bold]loud[/bold]", "count": 1234}])
    shown = capsys.readouterr().out
    assert "[/x] [bold]loud[/bold]" in shown
    assert "1,234" in shown


def test_json_holds_the_values_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a", "count": 1234, "share": 0.5, "nothing": None}]
    show_table("things", rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    show_record("thing", rows[0], as_json=True)
    assert json.loads(capsys.readouterr().out) == rows[0]


def test_an_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("things", [])
    assert "nothing yet" in capsys.readouterr().out


def test_a_pipe_gets_rows_whole_and_a_chosen_width_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{f"the column number {place}": "a value of " + "twenty " * 3 for place in range(5)}]
    monkeypatch.delenv("COLUMNS", raising=False)
    show_table("wide", rows)
    assert capsys.readouterr().out.count("a value of twenty twenty twenty") == len(rows[0])
    monkeypatch.setenv("COLUMNS", "60")
    show_table("wide", rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_a_title_is_on_one_line_and_a_list_of_nothing_is_a_dash(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show_table("history, newest first", [])
    show_table("t", [{"models": []}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "history, newest first"
    assert lines[-2] == "│ -      │"
