"""Report and MLflow page stay fast with a thousand runs in one store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.faults.servers import environment, plain_server, start_trial, wait_for

MAX_SECONDS = 10.0
API = "/ajax-api/2.0/mlflow"


def timed_call(address: str, body: dict[str, Any] | None = None) -> tuple[Any, float]:
    """Return the answer to a call such as the page makes, and its seconds."""
    began = time.monotonic()
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None)  # noqa: S310 - our own
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        content = answer.read()
    return json.loads(content), time.monotonic() - began


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_report_and_page_open_in_seconds(tmp_path: Path) -> None:
    own = environment(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    wait_for(start_trial(tmp_path / "trial", own | {"MLFLOW_TRACKING_URI": uri}, 500, "loss=[ce,nll]", "epochs=2"))
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "pipeline.report", str(tmp_path / "trial")], env=own, check=True)
    seconds = {"report": time.monotonic() - began}
    with plain_server(tmp_path) as server:
        search = {"experiment_ids": ["1"], "filter": "tags.kind = 'train'", "order_by": ["attributes.start_time ASC"]}
        for shown in (100, 1000):  # what the page shows at first, and everything
            page, seconds[f"{shown} runs"] = timed_call(
                f"{server.url}{API}/runs/search", search | {"max_results": shown}
            )
            assert len(page["runs"]) == shown
        runs = "&".join(f"run_ids={run['info']['run_id']}" for run in page["runs"][:100])
        history = f"{API}/metrics/get-history-bulk-interval?{runs}&metric_key=val%2Fnll&max_results=320"
        _, seconds["a chart of 100 runs"] = timed_call(server.url + history)
    print(", ".join(f"{what}: {value:.1f} s" for what, value in seconds.items()))
    assert max(seconds.values()) < MAX_SECONDS
