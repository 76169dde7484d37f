"""A disk in memory that can be killed or lose power in the middle of any operation.

After SIGKILL everything that was done is there. After a power cut a file's bytes are there as far as they were flushed,
and of the names that changed since the folder was flushed, any may have survived and any may not: harsher than what
file systems with a journal do.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge.deferred.disk import Disk

Survives = Callable[[], bool]


class Killed(BaseException):
    """The process ends here; not an Exception, so that nothing handles it."""


@dataclass
class Inode:
    data: bytes


class SimulatedDisk(Disk):
    def __init__(self, names: dict[str, Inode] | None = None) -> None:
        self._names = dict(names or {})  # as the process sees them
        self._flushed = dict(self._names)
        self._journal: list[tuple[str, Inode | None]] = []  # names that changed since they were flushed, None: gone
        self.aside: list[str] = []
        self.steps_left: int | None = None  # until it is killed
        self.refuses: set[str] = set()  # operations that fail, by name
        self.steps = 0

    def after_kill(self) -> SimulatedDisk:
        return SimulatedDisk(self._names)

    def after_power_cut(self, survives: Survives) -> SimulatedDisk:
        names = dict(self._flushed)
        for name, inode in self._journal:
            if not survives():
                continue
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode
        return SimulatedDisk(names)

    def alter(self, name: str, change: Callable[[bytes], bytes]) -> None:
        self._names[name] = self._flushed[name] = Inode(change(self._names[name].data))

    def names(self) -> list[str]:
        return sorted(self._names)

    def size(self, name: str) -> int:
        return len(self.read(name))

    def read(self, name: str, limit: int = -1) -> bytes:
        self._check("read")
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        data = self._names[name].data
        return data if limit < 0 else data[:limit]

    def write(self, name: str, data: bytes) -> None:
        self._check("write")
        if name in self._names:
            raise FileExistsError(errno.EEXIST, "is there", name)
        inode = Inode(b"")
        self._link(name, inode)
        self._fill(inode, data)

    def append(self, name: str, data: bytes) -> None:
        self._check("append")
        if name not in self._names:
            self._link(name, Inode(b""))
        self._fill(self._names[name], data)

    def rename(self, name: str, new_name: str) -> None:
        self._check("rename")
        self._step()
        inode = self._names.pop(name)
        self._names[new_name] = inode
        self._journal += [(new_name, inode), (name, None)]

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._check("remove")
            self._step()
            if self._names.pop(name, None) is not None:
                self._journal.append((name, None))

    def sync(self) -> None:
        self._check("sync")
        self._step()
        self._flushed = dict(self._names)
        self._journal = []

    def set_aside(self, name: str) -> None:
        self.remove([name])
        self.aside.append(name)

    def _link(self, name: str, inode: Inode) -> None:
        self._step()
        self._names[name] = inode
        self._journal.append((name, inode))

    def _fill(self, inode: Inode, data: bytes) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._step()
            inode.data += part

    def _check(self, operation: str) -> None:
        if operation in self.refuses:
            raise OSError(errno.ENOSPC, "no space left on device")

    def _step(self) -> None:
        self.steps += 1
        if self.steps_left is not None:
            if self.steps_left == 0:
                raise Killed
            self.steps_left -= 1
