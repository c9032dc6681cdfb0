import json

import pytest

from splitpoint.cli import main

from .. import tiny


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_are_timed_three_ways_after_a_check(tmp_path, capsys):
    folder = tiny.save(tmp_path / "model")
    config = tmp_path / "config.json"
    fields = {"max_size": 8, "compile_sizes": [4], "linear": "inductor", "lazy": True}
    config.write_text(json.dumps(fields))
    out = tmp_path / "out.json"
    arguments = ["--sizes", "4", "--dtype", "fp32", "--seconds", "0.01", "--json", str(out)]
    assert main(["bench", "parallel", str(folder), "--config", str(config), *arguments]) == 0
    report = json.loads(out.read_text())
    assert set(report["ms"]["4"]) == {"gloo", "shm unfused", "shm fused"}
    assert report["norms"] == 2 * tiny.LAYERS
    assert report["fused"]["[4,4]"] == 2 * tiny.LAYERS
    assert report["saved"]["4"].keys() == {
        "ms",
        "error_ms",
        "predicted_ms",
        "predicted_error_ms",
    }
    assert report["saved"]["4"]["error_ms"] > 0
    assert 0 < report["difference"]["4"] < 1e-4
    assert f"Fused of {2 * tiny.LAYERS} all-reduce + norm" in capsys.readouterr().out
