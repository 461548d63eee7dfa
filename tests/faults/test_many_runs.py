"""A thousand runs in one store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.faults.serving import environment, plain_server, running
from tests.faults.trials import begin, ended

BEARABLE = 10.0  # seconds
API = "/ajax-api/2.0/mlflow"


def asked(address: str, body: dict[str, Any] | None = None) -> tuple[Any, float]:
    """The answer to a call as the page makes it, and how long it took."""
    begun = time.monotonic()
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None)  # noqa: S310 - our own
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        content = answer.read()
    return json.loads(content), time.monotonic() - begun


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_report_and_page_still_open_soon(tmp_path: Path) -> None:
    own = environment(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    ended(begin(tmp_path / "trial", own | {"MLFLOW_TRACKING_URI": uri}, 500, "loss=[ce,nll]", "epochs=2"))
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "pipeline.report", str(tmp_path / "trial")], env=own, check=True)
    took = {"report": time.monotonic() - begun}
    with running(plain_server(tmp_path)) as server:
        search = {"experiment_ids": ["1"], "filter": "tags.kind = 'train'", "order_by": ["attributes.start_time ASC"]}
        for shown in (100, 1000):  # what the page shows at first, and everything
            found, took[f"{shown} runs"] = asked(f"{server.url}{API}/runs/search", search | {"max_results": shown})
            assert len(found["runs"]) == shown
        runs = "&".join(f"run_ids={run['info']['run_id']}" for run in found["runs"][:100])
        history = f"{API}/metrics/get-history-bulk-interval?{runs}&metric_key=val%2Fnll&max_results=320"
        _, took["a chart of 100 runs"] = asked(server.url + history)
    print(", ".join(f"{what}: {seconds:.1f} s" for what, seconds in took.items()))
    assert max(took.values()) < BEARABLE
