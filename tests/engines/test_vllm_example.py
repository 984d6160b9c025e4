"""The example, as a reader would run it: twice, in vLLM's environment."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.engines.conftest import ROOT, VLLM_ENVIRONMENT

pytestmark = pytest.mark.engines


def test_the_text_is_loaded_the_second_time(
    vllm_python: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text((ROOT / "LICENSE").read_text()[:6000])
    example = ROOT / "examples" / "vllm_offline.py"
    command = [vllm_python, example, model_folder, tmp_path / "text", tmp_path / "cache"]
    own = {name: VLLM_ENVIRONMENT[name] for name in VLLM_ENVIRONMENT if "MULTIPROC" not in name}
    shares = []
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said = re.search(r"(\d+) of (\d+) tokens were loaded", done.stdout)
        assert said is not None, done.stdout
        shares.append(int(said[1]) / int(said[2]))
    assert shares[0] < 0.6
    assert shares[1] > 0.95
