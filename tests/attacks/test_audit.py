"""The audit log against somebody who can write its files and has no key: a hundred random tamperings, all found.

Every log is written by the real writer. What cannot be found in the folder alone is shown, too: a log whose files and
head were all taken back to an earlier state is found with a head that was kept elsewhere.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from security.audit.records import GENESIS, Head, Link, canonical, hash_of, parse_head, parse_line, sign_head
from security.audit.verification import ChainReport, Problem, verify
from tests.security.audit.logs import fill, keys_of, open_log

Lines = list[bytes]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of two chains, each in several files, with checkpoints."""
    home = tmp_path_factory.mktemp("audit")
    one, two = (open_log(home, segment_bytes=6000, checkpoint_records=11) for _ in range(2))
    fill(one, 60)
    fill(two, 60)
    one.close()
    two.close()
    return home


class Tampered:
    """A copy of the log that can be written."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._open(home / "log", folder)

    def _open(self, log: Path, folder: Path) -> None:
        shutil.copytree(log, folder)
        self.folder = folder
        heads = sorted(folder.glob("*.head"))
        self.chain, self.other = heads[0].stem, heads[-1].stem

    @classmethod
    def of(cls, log: Path, folder: Path) -> Tampered:
        made = cls.__new__(cls)
        made._open(log, folder)
        return made

    def problem(self, home: Path) -> Problem:
        found = self.report(home).problem
        assert found is not None
        return found

    def files(self, chain: str = "") -> list[Path]:
        return sorted(self.folder.glob(f"{chain or self.chain}-*.jsonl"))

    def lines(self, chain: str = "") -> Lines:
        return [line for file in self.files(chain) for line in file.read_bytes().splitlines(keepends=True)]

    def put(self, lines: Lines) -> None:
        """Write the chain's lines back, each file as long as it was."""
        counts = [len(file.read_bytes().splitlines()) for file in self.files()]
        for file, count in zip(self.files(), counts, strict=True):
            part, lines = (lines[:count], lines[count:]) if file != self.files()[-1] else (lines, [])
            file.write_bytes(b"".join(part))

    def report(self, home: Path, kept: tuple[Head, ...] = ()) -> ChainReport:
        (report,) = [row for row in verify(self.folder, keys_of(home), kept) if row.chain == self.chain]
        return report


def edit_a_byte(log: Tampered, rng: random.Random) -> set[str]:
    lines = log.lines()
    place = rng.randrange(len(lines))
    line = bytearray(lines[place])
    line[rng.randrange(len(line) - 1)] ^= rng.randrange(1, 256)
    lines[place] = bytes(line)
    log.put(lines)
    return {"edited"}


def remove_a_record(log: Tampered, rng: random.Random) -> set[str]:
    lines = log.lines()
    del lines[rng.randrange(len(lines))]
    log.put(lines)
    return {"removed", "truncated"}


def swap_two(log: Tampered, rng: random.Random) -> set[str]:
    lines = log.lines()
    one, two = rng.sample(range(len(lines)), 2)
    lines[one], lines[two] = lines[two], lines[one]
    log.put(lines)
    return {"reordered"}


def truncate_at_a_record(log: Tampered, rng: random.Random) -> set[str]:
    lines = log.lines()
    log.put(lines[: rng.randrange(len(lines))])
    return {"truncated"}


def truncate_in_a_record(log: Tampered, rng: random.Random) -> set[str]:
    file = log.files()[-1]
    file.write_bytes(file.read_bytes()[: -rng.randrange(1, 300)])
    return {"truncated", "edited"}


def remove_a_file(log: Tampered, rng: random.Random) -> set[str]:
    rng.choice(log.files()).unlink()
    return {"removed", "truncated"}


def remove_the_head(log: Tampered, rng: random.Random) -> set[str]:
    del rng
    (log.folder / f"{log.chain}.head").unlink()
    return {"truncated"}


def duplicate(log: Tampered, rng: random.Random) -> set[str]:
    lines = log.lines()
    lines.insert(rng.randrange(len(lines) + 1), lines[rng.randrange(len(lines))])
    log.put(lines)
    return {"duplicated", "reordered"}


def splice_from_another_chain(log: Tampered, rng: random.Random) -> set[str]:
    lines, foreign = log.lines(), log.lines(log.other)
    place = rng.randrange(min(len(lines), len(foreign)))
    lines[place] = foreign[place]
    log.put(lines)
    return {"foreign"}


def head_of_another_chain(log: Tampered, rng: random.Random) -> set[str]:
    del rng
    shutil.copy(log.folder / f"{log.other}.head", log.folder / f"{log.chain}.head")
    return {"foreign"}


def rehash_from_here(log: Tampered, rng: random.Random) -> set[str]:
    """Change a record and make every hash after it right again, as anybody can: signatures are what is missing."""
    lines = log.lines()
    place, previous = rng.randrange(len(lines)), ""
    for number in range(place, len(lines)):
        record = parse_line(lines[number][:-1])
        if number == place:
            record |= {"action": "/isthmus.v1.FleetService/GetDevice"}
        else:
            record["prev"] = previous
        record["hash"] = previous = hash_of(record)
        lines[number] = canonical(record) + b"\n"
    log.put(lines)
    return {"forged", "rewritten"}


def rehash_one(log: Tampered, rng: random.Random) -> set[str]:
    lines = log.lines()
    place = rng.randrange(len(lines))
    record = parse_line(lines[place][:-1]) | {"decision": "refused"}
    record["hash"] = hash_of(record)
    lines[place] = canonical(record) + b"\n"
    log.put(lines)
    return {"rewritten", "forged"}


def rewrite_all_with_another_key(log: Tampered, rng: random.Random) -> set[str]:
    """A whole new chain of the same name, checkpoints and head included."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(rng.randbytes(32))
    previous, lines = GENESIS, log.lines()
    for number, line in enumerate(lines):
        record = parse_line(line[:-1]) | {"prev": previous, "token_id": "x"}
        record["hash"] = previous = hash_of(record)
        lines[number] = canonical(record) + b"\n"
    log.put(lines)
    file = log.folder / f"{log.chain}.head"
    file.write_bytes(sign_head(Link(log.chain, len(lines) - 1, previous), key, datetime.now(UTC)).to_json())
    return {"forged"}


TAMPERINGS: tuple[Callable[[Tampered, random.Random], set[str]], ...] = (
    edit_a_byte, remove_a_record, swap_two, truncate_at_a_record, truncate_in_a_record, remove_a_file, remove_the_head,
    duplicate, splice_from_another_chain, head_of_another_chain, rehash_from_here, rehash_one,
    rewrite_all_with_another_key,
)  # fmt: skip


def test_the_log_itself_is_sound(home: Path, tmp_path: Path) -> None:
    assert Tampered(home, tmp_path / "copy").report(home).problem is None


@pytest.mark.parametrize("seed", range(104))
def test_each_of_a_hundred_tamperings_is_found(home: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    log = Tampered(home, tmp_path / "copy")
    sound = log.lines()
    expected = TAMPERINGS[seed % len(TAMPERINGS)](log, rng)
    problem = log.report(home).problem
    assert problem is not None
    assert problem.kind in expected, problem
    check_place(problem, sound, log.lines())


def check_place(problem: Problem, sound: Lines, tampered: Lines) -> None:
    """Check that what is named is not behind the first line that changed by more than its next checkpoint."""
    first = next((n for n, (a, b) in enumerate(zip(sound, tampered, strict=False)) if a != b), len(tampered))
    if problem.kind in ("edited", "removed", "reordered", "foreign", "truncated") and problem.line:
        assert problem.seq == first, problem
    if problem.kind in ("forged", "rewritten") and problem.line and tampered != sound:
        assert problem.seq - first <= 12, problem


@pytest.mark.parametrize("tampering", [rehash_one, rehash_from_here, truncate_at_a_record, truncate_in_a_record])
def test_what_no_checkpoint_speaks_for_yet_is_guarded_by_the_head(
    tmp_path: Path, tampering: Callable[[Tampered, random.Random], set[str]]
) -> None:
    """A log that is being written: its newest records have been signed in the head only."""
    site = tmp_path / "site"
    log = open_log(site, checkpoint_records=1000)
    fill(log, 8)
    shutil.copytree(site / "log", site / "running")
    log.close()
    for seed in range(12):
        copy = Tampered.of(site / "running", tmp_path / f"copy-{seed}")
        assert tampering(copy, random.Random(seed)) & {copy.problem(site).kind}


def test_taking_everything_back_is_found_with_a_head_from_elsewhere(home: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    log = open_log(site, checkpoint_records=5)
    fill(log, 10)
    early = tmp_path / "early"
    shutil.copytree(site / "log", early)  # the attacker's own copy of an honest state
    fill(log, 10, first=10)
    log.close()
    kept = parse_head((site / "log" / f"{log.chain}.head").read_bytes())
    (alone,) = verify(early, keys_of(site))
    assert alone.problem is None  # what the folder alone cannot tell
    (report,) = verify(early, keys_of(site), [kept])
    assert report.problem is not None
    assert report.problem.kind == "truncated"
    assert f"record {kept.seq} was signed" in report.problem.message
    shutil.rmtree(early)
    early.mkdir()
    (gone,) = verify(early, keys_of(site), [kept])  # the whole chain, head included
    assert gone.problem is not None


def test_a_kept_head_that_was_forged_is_said_to_be(home: Path, tmp_path: Path) -> None:
    log = Tampered(home, tmp_path / "copy")
    head = parse_head((log.folder / f"{log.chain}.head").read_bytes())
    forged = Head(head.chain, head.seq, "0" * 64, head.at, head.key, head.signature)
    problem = log.report(home, (forged,)).problem
    assert problem is not None
    assert (problem.kind, problem.file) == ("forged", "a kept head")
