"""Whether a log is what was written: every record, its order, every checkpoint, and the end of every chain.

For each chain, in order:
1. its files are numbered from 1 without a gap
2. each line is the canonical form of a record with the right hash, of this chain, next in sequence, and continues the
   hash of the one before it
3. each checkpoint was signed by a trusted key for what stands before it
4. the head was signed by a trusted key, its record is there, and has that hash
5. heads that were kept elsewhere are in the log, too
What is behind the head is either a group of which the process has not signed the head yet, or what a crash left; it is
checked as above, and told. The first thing that is wrong with a chain is the one that is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import InputError, TrustError
from security.audit.reading import Line, Segment, chains_of, read_lines
from security.audit.records import CHECKPOINT, Head, Link, check_head, head_of_checkpoint, parse_head, parse_line

_UNFINISHED: Final = "the last line is not whole: it is being written, or a crash broke it off"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and with which record."""

    kind: str  # edited, removed, reordered, duplicated, foreign, rewritten, truncated, forged
    message: str
    seq: int
    file: str = ""
    line: int = 0


@dataclass(slots=True)
class ChainReport:
    """What a chain holds, up to what is wrong with it."""

    chain: str
    records: int = 0
    checkpoints: int = 0
    first_at: str = ""
    last_at: str = ""
    problem: Problem | None = None
    notes: list[str] = field(default_factory=list)


class _Found(Exception):  # noqa: N818 - carries a finding, not a failure
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def verify(folder: Path, keys: Mapping[str, ed25519.Ed25519PublicKey], kept: Sequence[Head] = ()) -> list[ChainReport]:
    """Return one report for each chain of a log, and for each chain that a kept head speaks of.

    Args:
        folder: The log.
        keys: Whose checkpoints are trusted.
        kept: Heads that were kept elsewhere.

    Raises:
        NotFoundError: There is no such folder.
    """
    chains = chains_of(folder)
    reports = []
    for chain in sorted({*chains, *(head.chain for head in kept)}):
        own = [head for head in kept if head.chain == chain]
        reports.append(_Chain(folder, chain, keys, own).verify())
    return reports


class _Chain:
    def __init__(
        self,
        folder: Path,
        chain: str,
        keys: Mapping[str, ed25519.Ed25519PublicKey],
        kept: list[Head],
    ) -> None:
        self._folder, self._chain, self._keys, self._kept = folder, chain, keys, kept
        self._segments: list[Segment] = []
        self._report = ChainReport(chain)
        self._link = Link(chain)
        self._signed = -1  # newest record that a checkpoint speaks for
        self._wanted: dict[int, list[Head]] = {}

    def verify(self) -> ChainReport:
        try:
            heads = [self._head(), *self._kept]
            for head in heads:
                self._wanted.setdefault(head.seq, []).append(head)
            # after the head: of a log that is being written, the head must not be ahead of what is read
            self._segments = chains_of(self._folder).get(self._chain, [])
            self._check_numbers()
            for line in self._lines():
                self._check_line(line, covered=heads[0].seq)
            self._check_end(heads)
        except _Found as found:
            self._report.problem = found.problem
        return self._report

    def _head(self) -> Head:
        file = self._folder / f"{self._chain}.head"
        try:
            head = parse_head(file.read_bytes())
        except FileNotFoundError:
            raise self._found("truncated", "the head of the chain is gone", 0, file=file.name) from None
        except TrustError as error:
            raise self._found("forged", f"the head is damaged: {error.message}", 0, file=file.name) from error
        for signed, name in [(head, file.name), *((head, "a kept head") for head in self._kept)]:
            try:
                check_head(signed, self._keys)
            except TrustError as error:
                raise self._found("forged", f"the head of the chain: {error.message}", signed.seq, file=name) from error
        if head.chain != self._chain:
            raise self._found("foreign", f"the head is that of chain {head.chain[:32]}", head.seq, file=file.name)
        return head

    def _check_numbers(self) -> None:
        for place, segment in enumerate(self._segments, 1):
            if segment.number != place:
                message = f"file {place} of the chain is gone, and the records in it"
                raise self._found("removed", message, self._link.seq + 1, file=segment.path.name)

    def _lines(self) -> Iterator[Line]:
        for segment in self._segments:
            yield from read_lines(segment)

    def _check_line(self, line: Line, *, covered: int) -> None:
        expected = self._link.seq + 1
        try:
            record = parse_line(line.data)
        except InputError as error:
            if not line.whole and expected > covered:
                self._report.notes.append(_UNFINISHED)
                return
            raise self._found("edited", f"record {expected}: {error.message}", expected, line) from error
        if not line.whole and expected <= covered:
            raise self._found("truncated", f"record {expected} has lost its end of line", expected, line)
        self._check_place(record, line, expected)
        if record["prev"] != self._link.hash:
            message = f"record {expected - 1} is not the one that record {expected} continues: it was replaced"
            raise self._found("rewritten", message, max(expected - 1, 0), line)
        self._link = Link(self._chain, record["seq"], record["hash"])
        self._check_signed(record, line)
        self._report.records += 1
        self._report.first_at = self._report.first_at or str(record.get("at", ""))
        self._report.last_at = str(record.get("at", ""))

    def _check_place(self, record: Mapping[str, Any], line: Line, expected: int) -> None:
        seq = record["seq"]
        if record["chain"] != self._chain:
            raise self._found("foreign", f"a record of chain {record['chain'][:32]} stands here", expected, line)
        if seq == expected:
            return
        if seq < expected:
            raise self._found("duplicated", f"record {seq} stands here again, after record {expected - 1}", seq, line)
        if self._comes_later(expected):
            raise self._found("reordered", f"record {seq} stands before record {expected}", expected, line)
        last = f" to {seq - 1}" if seq - 1 > expected else ""
        raise self._found("removed", f"record {expected}{last} is gone", expected, line)

    def _comes_later(self, seq: int) -> bool:
        for line in self._lines():
            try:
                record = parse_line(line.data)
            except InputError:
                continue
            if record["seq"] == seq and record["chain"] == self._chain:
                return True
        return False

    def _check_signed(self, record: Mapping[str, Any], line: Line) -> None:
        if record.get("kind") == CHECKPOINT:
            self._report.checkpoints += 1
            try:
                check_head(head_of_checkpoint(record), self._keys)
            except TrustError as error:
                message = f"checkpoint {record['seq']}: {error.message}; records {self._signed + 1} to "
                message += f"{record['seq'] - 1} are not those that were signed"
                raise self._found("forged", message, record["seq"], line) from error
            self._signed = record["seq"] - 1
        for head in self._wanted.pop(record["seq"], ()):
            if head.hash != record["hash"]:
                message = f"record {head.seq} is not the one that was signed at {head.at}: "
                message += f"records from {self._signed + 1} on were rewritten"
                raise self._found("rewritten", message, self._signed + 1, line)

    def _check_end(self, heads: list[Head]) -> None:
        last = self._link.seq
        missing = [head for head in heads if head.seq > last]
        if missing:
            head = max(missing, key=lambda head: head.seq)
            message = f"the log ends with record {last}; record {head.seq} was signed at {head.at}"
            raise self._found("truncated", message, last + 1)
        behind = last - heads[0].seq
        if behind:
            self._report.notes.append(f"{behind} records are behind the signed head")

    def _found(self, kind: str, message: str, seq: int, line: Line | None = None, file: str = "") -> _Found:
        return _Found(Problem(kind, message, seq, line.file if line else file, line.number if line else 0))
