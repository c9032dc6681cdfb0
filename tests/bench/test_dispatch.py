import json

import pytest

from splitpoint.bench.dispatch import PLANS, run


@pytest.mark.slow
def test_report_has_a_row_a_plan_and_times():
    report = run(layers=2, budget_s=0.02)
    assert [row.plan for row in report.rows] == list(PLANS)
    assert [row.ranges for row in report.rows] == [1, 12, 67]
    for row in report.rows:
        assert min(row.empty_us, row.lookup_us, row.wrapper_us, row.guarded_us) > 0
        assert row.dispatch_us == row.lookup_us - row.empty_us
    data = json.loads(report.to_json())
    assert data["environment"]["layers"] == 2
    assert set(data["rows"][0]) >= {"plan", "empty_us", "lookup_us", "wrapper_us", "dispatch_us"}
    assert str(report).count("\n") > 6
