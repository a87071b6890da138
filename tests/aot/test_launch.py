"""Every shipped kernel can be launched by its operator, as far as that shows without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from personvit.kernels.aot import all_builds

SCRIPT = Path(__file__).with_name("dry_launch.py")


def test_operators_launch_every_kernel() -> None:
    # In a process of its own: here kernels are interpreted, and Triton believes in one driver.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # of a checkout that is not installed, too
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    launches = json.loads(result.stdout)
    kernels = {build.kernel.__name__ for _, build in all_builds()}
    assert kernels - launches.keys() == set()
