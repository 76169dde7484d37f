"""What the writer promises: durable, in order, mended after a crash, and honest when the disk refuses."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.errors import ConfigError, UnavailableError
from security.audit.keys import KEY, load_audit_key, rotate_audit_key
from security.audit.reading import Query, search
from security.audit.records import Event, key_id_of
from security.audit.verification import verify
from tests.security.audit.logs import fill, keys_of, open_log


def lines(home: Path) -> list[bytes]:
    return [line for file in sorted((home / "log").glob("*.jsonl")) for line in file.read_bytes().splitlines()]


def test_a_log_is_sound_across_restarts_and_files(tmp_path: Path) -> None:
    for start in range(3):
        log = open_log(tmp_path, segment_bytes=4000, checkpoint_records=7)
        fill(log, 20, first=20 * start)
        log.close()
    (report,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert report.problem is None
    assert report.notes == []
    assert report.records == len(lines(tmp_path))
    assert report.checkpoints >= 8
    assert len(list((tmp_path / "log").glob("*.jsonl"))) > 3
    devices = [record["device"] for record in search(tmp_path / "log", Query(action="pin"))]
    assert devices == [f"press-{number}" for number in range(60)]


def test_a_record_is_on_the_disk_when_write_returns(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 1)
    assert json.loads(lines(tmp_path)[-1])["device"] == "press-0"
    log.close()


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    open_log(tmp_path).close()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "log").iterdir()} == {0o600}
    assert (tmp_path / KEY).stat().st_mode & 0o777 == 0o600


def test_two_writers_have_a_chain_each_and_verify_checks_both(tmp_path: Path) -> None:
    one, two = open_log(tmp_path), open_log(tmp_path)
    assert one.chain != two.chain
    fill(one, 3)
    fill(two, 3)
    chains = {one.chain, two.chain}
    one.close()
    two.close()
    again = open_log(tmp_path)
    assert again.chain in chains  # taken up again, not a third one
    again.close()
    reports = verify(tmp_path / "log", keys_of(tmp_path))
    assert {report.chain for report in reports} == chains
    assert all(report.problem is None for report in reports)


def test_text_of_a_caller_cannot_forge_a_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.note(Event("x", "done", device='a"}\n{"kind":"event"\r\u2028\x1b[2J' + "z" * 10_000))
    log.close()
    (report,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert report.problem is None
    (record,) = search(tmp_path / "log", Query(action="x"))
    assert len(record["device"]) == 300
    assert record["device"].isprintable()


WRITER = """
import sys, time
from pathlib import Path
from tests.security.audit.logs import fill, open_log
log = open_log(Path(sys.argv[1]))
number = 0
while True:
    fill(log, 1, first=number)
    print(number, flush=True)
    number += 1
"""


def test_after_sigkill_nothing_that_was_promised_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | paths) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 30:
            pass
        writer.send_signal(signal.SIGKILL)
        promised = [30, *(int(text) for text in writer.stdout.read().split())][-1]
    open_log(tmp_path).close()
    (report,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert report.problem is None
    devices = [record["device"] for record in search(tmp_path / "log", Query(action="Pin"))]
    assert devices[: promised + 1] == [f"press-{number}" for number in range(promised + 1)]


def test_half_a_line_behind_the_head_is_mended_and_recorded(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 3)
    log.close()
    (file,) = (tmp_path / "log").glob("*.jsonl")
    with file.open("ab") as broken:
        broken.write(b'{"action":"half')
    (before,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert before.problem is None
    assert before.notes == ["the last line is not whole: it is being written, or a crash broke it off"]
    open_log(tmp_path).close()
    (report,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert (report.problem, report.notes) == (None, [])
    (mended,) = search(tmp_path / "log", Query(action="audit.mended"))
    assert mended["detail"]["bytes"] == 15


def test_half_a_line_that_the_head_speaks_of_is_tampering(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 3)
    log.close()
    (file,) = (tmp_path / "log").glob("*.jsonl")
    os.truncate(file, file.stat().st_size - 20)
    again = open_log(tmp_path)  # another chain: the old one stays as it is
    again.close()
    reports = {report.chain: report for report in verify(tmp_path / "log", keys_of(tmp_path))}
    assert reports.pop(again.chain).problem is None
    (old,) = reports.values()
    assert old.problem is not None
    assert list(search(tmp_path / "log", Query(action="audit.chain-left")))


def test_a_disk_that_refuses_fails_writes_and_is_told_of_afterwards(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(len(line) + 1 for line in lines(tmp_path)) + 100, hard))
    try:
        with pytest.raises(UnavailableError) as raised:
            fill(log, 1)
        assert raised.value.reason == "audit-unavailable"
        log.note(Event("inference", "done"))
        with pytest.raises(UnavailableError):
            fill(log, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fill(log, 1, first=77)
    log.close()
    (report,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert report.problem is None
    (lost,) = search(tmp_path / "log", Query(action="audit.lost"))
    assert lost["detail"]["records"] == 1
    assert log.counters.lost == 1


def test_a_disk_with_too_little_room_counts_as_full(tmp_path: Path) -> None:
    log = open_log(tmp_path, min_free_bytes=1 << 62)
    with pytest.raises(UnavailableError):
        fill(log, 1)
    log.close()


def test_a_full_queue_refuses_and_counts(tmp_path: Path) -> None:
    log = open_log(tmp_path, queue=0)
    log.note(Event("x", "done"))
    assert log.counters.lost >= 1
    with pytest.raises(UnavailableError):
        asyncio.run(log.write(Event("x", "done")))
    log.close()


def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    tmp_path.joinpath("log").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write the audit log"):
        open_log(tmp_path)


def test_a_rotated_key_signs_and_the_old_one_is_still_known(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 2)
    log.close()
    rotate_audit_key(tmp_path)
    log = open_log(tmp_path)
    fill(log, 2)
    log.close()
    (report,) = verify(tmp_path / "log", keys_of(tmp_path))
    assert report.problem is None
    assert len(keys_of(tmp_path)) == 2
    assert key_id_of(load_audit_key(tmp_path).public_key()) in keys_of(tmp_path)
