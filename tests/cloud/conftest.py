"""A real Triton and tiny heavy models for the tests of the cloud."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from cloud import database as db
from tests.cloud.postgresql import PostgreSql, postgresql_server
from tests.cloud.redis_server import redis_server

CONFIG: Final = """
backend: "python"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "logits" data_type: TYPE_FP32 dims: [ 3 ] }
instance_group { kind: KIND_CPU count: 1 }
"""
# y = factor * x[:, :3]; the first element of x asks for trouble: -1 raises, -2 takes a while
MODEL: Final = """
import time

import numpy as np
import triton_python_backend_utils as utils

FACTOR = {factor}


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = utils.get_input_tensor_by_name(request, "x").as_numpy()
            if x[0, 0] == -1:
                raise ValueError("secret detail of the model")
            if x[0, 0] == -2:
                time.sleep(0.4)
            answers.append(utils.InferenceResponse([utils.Tensor("logits", np.float32(FACTOR) * x[:, :3])]))
        return answers
"""


def write_heavy(folder: Path, factor: float) -> None:
    """Write a Triton model folder whose model multiplies by `factor`."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1" / "model.py").write_text(MODEL.format(factor=factor))


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, *, within_s: float = 20.0) -> None:
    """Wait until `condition` holds; fail with `what` when it does not in time."""
    try:
        async with asyncio.timeout(within_s):
            while not await condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within {within_s} s: {what}")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[db.Database]:
    """A database of each kind that the cloud may run on."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'isthmus.db'}"
    else:
        url = request.getfixturevalue("postgresql").new_database()
    opened = db.Database(url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSql]:
    """A real PostgreSQL server, for as long as the tests run."""
    with postgresql_server(tmp_path_factory.mktemp("postgresql")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Redis server, for as long as the tests run."""
    with redis_server(tmp_path_factory.mktemp("redis")) as address:
        yield address
