import json

import pytest
import torch

from splitpoint.bench.linear_report import run, save_picture


@pytest.mark.slow
def test_every_variant_has_a_cell_at_every_size_it_was_timed_at(tmp_path):
    report = run(2048, 1024, torch.float32, sizes=[1, 40], threads=1, budget_s=0.02)
    assert report.sizes == [1, 40]
    assert report.row(1, "gemv") is not None
    assert report.row(40, "gemv") is None
    text = str(report)
    assert "1024 -> 2048, float32, 1 thread" in text
    assert text.count(" -") >= 1
    rows = json.loads(report.to_json())["rows"]
    assert {(row["size"], row["variant"]) for row in rows} == {
        (row.size, row.variant) for row in report.rows
    }
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    save_picture(report, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
