"""`isthmus traffic` as operators type it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from cloud.traffic_cli import _split, _version_and_share
from isthmus.errors import InputError
from isthmus.v1 import traffic_pb2 as pb
from tests.cloud.workspaces import make_bundle, make_workspace, serving

REPOSITORY = Path(__file__).parents[2]


def test_shares_are_read_as_people_write_them() -> None:
    assert _version_and_share("7=5%", "--canary") == (7, 0.05)
    assert _version_and_share("7=0.5%", "--canary") == (7, 0.005)
    split = _split(None, ["7=50%", "8=20%"], "meter")
    assert (split.assignment, split.key_parameter) == (pb.ASSIGNMENT_STICKY, "meter")
    assert [(share.version, share.share) for share in split.shares] == [(7, 0.5), (8, 0.2)]
    assert _split(["none"], None, "") == pb.Split()
    for wrong in ("7", "7=5", "=5%", "x=5%", "7=%", "²=5%", "7=5%%"):
        with pytest.raises(InputError, match="expected VERSION=SHARE%") as raised:
            _version_and_share(wrong, "--canary")
        assert "--canary 7=5%" in raised.value.hint


@pytest.mark.slow
def test_set_show_and_roll_back_in_a_shell(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")

    async def story() -> None:
        async with serving(workspace) as cloud:
            with workspace.client(cloud) as client:
                for version in (1, 2):
                    bundle = make_bundle(tmp_path / f"v{version}", version, factor=10.0 * version)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator, release=version == 1)
            settings = {
                "ISTHMUS_CLOUD": cloud.address, "ISTHMUS_TRUST": str(workspace.trust),
                "ISTHMUS_TOKEN_FILE": str(workspace.token_file()), "COLUMNS": "200",
                "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}",
            }  # fmt: skip

            async def isthmus(*words: str) -> tuple[int, str, str]:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "isthmus", "traffic", *words,
                    stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=os.environ | settings,
                )  # fmt: skip
                out, error = await process.communicate()
                assert process.returncode is not None
                return process.returncode, out.decode(), error.decode()

            code, out, error = await isthmus("set", "triage", "--canary", "2=5%", "--cache", "10m", "--json")
            assert code == 0, error
            assert json.loads(out)["shares"] == {"2": 0.05}
            code, out, _ = await isthmus("show", "--json")
            (record,) = json.loads(out)
            assert (record["kind"], record["cache_s"], record["released"]) == ("canary", 600, 1)
            code, out, _ = await isthmus("show")
            assert "canary 2=0.05; cache 600 s" in out
            code, _, error = await isthmus("rollback", "triage")
            assert (code, "triage@1 answers" in error) == (0, True)
            code, out, _ = await isthmus("replicas")
            assert "child-1" in out
            code, _, error = await isthmus("drain", "child-1")
            assert (code, "only Triton" in error, "hint: " in error) == (3, True, True)
            for words in (("set", "triage"), ("set", "triage", "--canary", "2=5%", "--ab", "2=5%")):
                code, _, error = await isthmus(*words)
                assert (code, "hint: " in error, "Traceback" in error) == (2, True, False)

    asyncio.run(story())
