"""The slow cluster tests: a killed Ray worker, and clusters without a Prefect server.

Run by `make test-cluster`; takes minutes.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trace_opd.data.store import Store
from trace_opd.tests.cluster.conftest import CONFIG, assert_a_killed_workers_part_is_made_again


def test_workers_report_to_the_runs_own_temporary_server(cluster, made, environment, tmp_path):
    """Bad input in a worker ends the command with one sentence and exit code 2."""
    root = Path(shutil.copytree(made, tmp_path / "store"))
    shutil.rmtree(root / "convert")
    part = Path(Store(root).get("annotations").path("part-00001.parquet"))
    part.unlink()
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(CONFIG.model_dump(mode="json")))
    variables = environment | cluster | {"PREFECT_HOME": str(tmp_path / "prefect")}
    variables["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    del variables["PREFECT_API_URL"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "trace_opd.flows",
        str(file),
        "--run",
        "--store",
        str(root),
    ]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert f"\ntrace-opd: {part}: file is gone" in done.stderr, output
    assert output.count("Starting temporary server") == 1
    assert len(list(root.glob("convert/*/part-*.parquet"))) == 2


@pytest.mark.parametrize("cluster", ["ray"], indirect=True)
def test_a_killed_workers_part_is_made_again(cluster, made, tmp_path):
    assert_a_killed_workers_part_is_made_again(made, tmp_path)
