"""A short run of every fuzzer; `python -m tests.fuzz all --seconds 600` is the long one."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from tests.fuzz.mutation import mutations
from tests.fuzz.targets import CORPUS, TARGETS, golden_requests

RUNS = {"csr": 1_000, "assertion": 1_000}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_accepted_or_refused(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    assert any(target.check(seed) for seed in seeds)  # a fuzzer that is always refused finds nothing
    for data in itertools.islice(mutations(seeds, random.Random(1)), RUNS.get(name, 3_000)):
        target.check(data)


@pytest.mark.parametrize("path", sorted((CORPUS / "csr").iterdir()), ids=lambda path: path.name)
def test_signing_requests_that_once_broke_the_cloud_are_refused(path: Path) -> None:
    assert not TARGETS["csr"].check(path.read_bytes())


def test_the_corpus_is_what_clients_send() -> None:
    found = {path.name: path.read_bytes() for path in (CORPUS / "request").iterdir()}
    assert found == golden_requests()
