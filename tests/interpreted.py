"""Tests marked `interpreter`, in Triton's interpreter.

It must be switched on before Triton is first imported, and other tests of the same process have long compiled with it.
So the bodies of these tests run in pytest processes of their own, and each test here takes over the outcome of its twin.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

import pytest

ENVIRONMENT = {"TRITON_INTERPRET": "1", "DELTANET_BACKEND": "triton", "DELTANET_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"
_OUTCOMES = pytest.StashKey[dict]()


def take_over(item) -> None:
    """End like the twin of `item`; the first call runs the twins of all chosen tests."""
    if _OUTCOMES not in item.session.stash:
        chosen = [one.nodeid for one in item.session.items if one.get_closest_marker("interpreter")]
        item.session.stash[_OUTCOMES] = _run(chosen, item.config)
    kind, text = item.session.stash[_OUTCOMES].get(item.nodeid, ("failure", "the interpreter's process ended without it"))
    if kind == "skipped":
        pytest.skip(text)
    if kind:
        pytest.fail(text, pytrace=False)


def _run(names: list[str], config) -> dict[str, tuple[str, str]]:
    """{test: (failure, error, skipped or nothing, its text)}, from two processes that share the tests."""
    parts, outcomes = [part for part in (names[::2], names[1::2]) if part], {}
    with tempfile.TemporaryDirectory() as folder:
        reports = [pathlib.Path(folder, f"{n}.xml") for n in range(len(parts))]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
        children = [
            subprocess.Popen(
                [*command, f"--junitxml={report}", *part],
                cwd=config.rootpath, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for report, part in zip(reports, parts)
        ]  # fmt: skip
        for child, report, part in zip(children, reports, parts):
            output = child.communicate()[0].decode(errors="replace")
            outcomes |= _read(report) if report.exists() else dict.fromkeys(part, ("failure", output[-4000:]))
    return outcomes


def _read(report: pathlib.Path) -> dict[str, tuple[str, str]]:
    outcomes = {}
    for case in xml.parse(report).iter("testcase"):
        results = [(x.tag, x.text or x.get("message")) for x in case if x.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"] = results[0] if results else ("", "")
    return outcomes
