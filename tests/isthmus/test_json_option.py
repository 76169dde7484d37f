"""Every command that has a result prints it as JSON on request, and says nothing else on standard output then."""

from __future__ import annotations

import pytest

from tests.isthmus.test_reference import all_commands, sections

WITHOUT = {
    "isthmus cloud serve": "runs until it is stopped; --ready-file has where",
    "isthmus edge run": "runs until it is stopped; --ready-file has where",
    "isthmus edge deferred watch": "prints one JSON object for each answer, whoever asks",
}


def test_every_other_command_takes_json() -> None:
    lacking = {name for name, command in all_commands().items() if "as_json" not in {p.name for p in command.params}}
    assert lacking == set(WITHOUT)


@pytest.mark.parametrize("name", sorted(sections()))
def test_the_reference_says_so(name: str) -> None:
    assert name in WITHOUT or "`--json`" in sections()[name]
