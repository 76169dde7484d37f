"""The load: nothing that goes wrong on the client's side is lost from the count."""

from __future__ import annotations

import numpy as np
import pytest

from examples.quickstart.datasets import Split
from examples.quickstart.traffic import SteadyLoad, send_all

NOWHERE = "127.0.0.1:1"
GOOD = Split({"x": np.zeros((3, 2), np.float32)}, np.zeros(3, np.int64))
UNSENDABLE = Split({"x": np.zeros((3, 2), np.complex64)}, np.zeros(3, np.int64))


def test_requests_that_nobody_answers_are_rows_that_failed() -> None:
    recording = send_all(NOWHERE, "m", GOOD, workers=2, tick=lambda _: None)
    assert sorted(record.sample for record in recording.records) == [0, 1, 2]
    assert {record.route for record in recording.records} == {"failed"}
    assert {record.prediction for record in recording.records} == {-1}


def test_a_defect_in_a_worker_is_raised_and_not_fewer_rows() -> None:
    with pytest.raises(KeyError):
        send_all(NOWHERE, "m", UNSENDABLE, workers=2, tick=lambda _: None)


def test_a_defect_in_the_steady_load_is_raised_and_not_a_quiet_success() -> None:
    with pytest.raises(KeyError), SteadyLoad(NOWHERE, "m", UNSENDABLE) as load:
        load._running[0].exception(timeout=10)  # it has sent by then
