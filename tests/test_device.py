"""The tests of devices, in a process of their own.

Torch makes a thread for each device when a process first runs backward: a device that comes later
has none, and a process that has such threads cannot be forked, as other tests are.
"""

import os
import subprocess
import sys

import pretend
import pytest
import torch
from helpers import ROOT


@pytest.mark.skipif(
    pretend.setup is None and not torch.cuda.is_available(),
    reason="there is no GPU, and this torch is too old for a device that is written in Python",
)
def test_everything_runs_on_another_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "device_tests.py")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20000:]
    assert " passed" in done.stdout
