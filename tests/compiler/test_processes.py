"""Real processes: modules that this test writes, run as the compiler runs its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from compiler.processes import (
    Budget,
    CancelledError,
    NotEnoughMemoryError,
    ToolCrashError,
    default_budget,
    run_process,
)
from compiler.targets import UnsupportedModelError
from isthmus.errors import InputError, MissingExtraError

HEAD = "import sys, os, time\nfrom pathlib import Path\nfrom compiler.processes import serve, say\n"


def budget(memory: int = 4 << 30, jobs: int = 2) -> Budget:
    return Budget(cores=2, memory=memory, jobs=jobs)


def run(folder: Path, body: str, budget_: Budget | None = None, **more: object) -> None:
    folder.mkdir(exist_ok=True)
    name = f"job_{folder.name}"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / f"{name}.py").write_text(f"{HEAD}def work(folder):\n{lines}\nserve(Path(sys.argv[1]), work)\n")
    run_process(name, folder, what="the job", budget=budget_ or budget(), path=folder, **more)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return path.read_text()


def test_progress_and_result_come_through_whatever_is_printed(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    run(
        tmp_path / "a",
        "print('a tool talks')\nsay('half', 1, 2)\nos.system('echo more')\n(folder / 'result').write_text('done')",
        advance=lambda *args: seen.append(args),
    )

    assert seen == [("half", 1, 2)]
    assert (tmp_path / "a" / "result").read_text() == "done"
    assert "a tool talks" in (tmp_path / "a" / "log.txt").read_text()


def test_errors_of_this_project_come_as_they_are(tmp_path: Path) -> None:
    body = (
        "from compiler.targets import UnsupportedModelError\nraise UnsupportedModelError('no LSTM', hint='use another')"
    )
    with pytest.raises(UnsupportedModelError) as caught:
        run(tmp_path / "a", body)
    assert (caught.value.message, caught.value.hint, caught.value.reason) == (
        "no LSTM", "use another", "unsupported-model",
    )  # fmt: skip
    with pytest.raises(MissingExtraError, match="a part is not installed"):
        run(tmp_path / "b", "from isthmus.errors import MissingExtraError\nraise MissingExtraError('a part', 'tvm')")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), 11)", "signal SIGSEGV"),
        ("raise RuntimeError('the tool is confused')", "RuntimeError: the tool is confused"),
        ("os._exit(3)", "exit code 3"),
    ],
)
def test_a_crash_is_an_error_with_the_last_words(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ToolCrashError, match=message):
        run(tmp_path / "a", body)


def test_a_full_disk_is_said_without_a_traceback(tmp_path: Path) -> None:
    body = "import errno\nraise OSError(errno.ENOSPC, 'No space left on device', '/some/file')"
    with pytest.raises(InputError, match=r"^/some/file: No space left on device$"):
        run(tmp_path / "a", body)


@pytest.mark.slow
def test_a_process_that_needs_too_much_memory_is_ended(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"needs more than the 0\.2 GiB"):
        run(tmp_path / "a", "hold = bytearray(600 << 20)\nhold[::4096] = b'x' * (len(hold) // 4096)\ntime.sleep(60)",
            budget(memory=int(0.2 * (1 << 30))))  # fmt: skip


@pytest.mark.slow
def test_a_process_that_fits_alone_gets_its_turn(tmp_path: Path) -> None:
    """Two that need 300 MiB each, where 450 may be used: one is ended, and runs again when the other is done."""
    shared = budget(memory=450 << 20)
    hold = "hold = bytearray(300 << 20)\nhold[::4096] = b'x' * (len(hold) // 4096)\n"
    body = f"{hold}time.sleep(1.5)\n(folder / 'done').touch()"
    threads = [threading.Thread(target=run, args=(tmp_path / name, body, shared)) for name in "ab"]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all((tmp_path / name / "done").exists() for name in "ab")


@pytest.mark.slow
def test_stopping_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    shared, errors = budget(jobs=1), []

    def attempt(name: str) -> None:
        try:
            run(tmp_path / name, "(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)", shared)
        except CancelledError as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    pid = _pid(tmp_path)
    shared.stop()
    for thread in threads:
        thread.join(timeout=20)

    assert len(errors) == 2
    assert not alive(pid)
    assert len(list(tmp_path.glob("*/pid"))) == 1


def _pid(tmp_path: Path) -> int:
    end = time.monotonic() + 20
    while True:
        for path in tmp_path.glob("*/pid"):
            if text := path.read_text():
                return int(text)
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "child.py").write_text(
        f"{HEAD}def work(folder):\n    (folder / 'pid').write_text(str(os.getpid()))\n    time.sleep(60)\n"
        "serve(Path(sys.argv[1]), work)\n"
    )
    parent = (
        "import sys; from pathlib import Path; from compiler.processes import Budget, run_process\n"
        f"folder = Path({str(folder)!r})\n"
        "run_process('child', folder, what='x', budget=Budget(1, 1 << 33, 1), path=folder)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    child = int(wait_for(folder / "pid"))

    process.send_signal(signal.SIGKILL)
    process.wait()

    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(child)


def test_the_default_budget_is_this_machine() -> None:
    found = default_budget()

    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory > 0
    assert found.threads * found.jobs <= found.cores
    assert default_budget(cores=1).jobs == 1
    assert default_budget(memory_gib=1.5).memory == 3 << 29
