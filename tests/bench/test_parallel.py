import json
import math

import pytest

from splitpoint import Config
from splitpoint.bench.parallel import Saved, settled
from splitpoint.cli.verbs import main

from .. import tiny


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_are_timed_three_ways_after_a_check(tmp_path, capsys):
    folder = tiny.save(tmp_path / "model")
    config = tmp_path / "config.json"
    fields = {"max_size": 8, "compile_sizes": [4], "linear": "inductor", "lazy": True}
    config.write_text(json.dumps(fields))
    out = tmp_path / "out.json"
    arguments = ["--sizes", "4", "--dtype", "fp32", "--seconds", "0.01", "--starts", "2"]
    arguments += ["--json", str(out)]
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
    assert report["starts"] == 2
    assert f"Fused of {2 * tiny.LAYERS} all-reduce + norm" in capsys.readouterr().out


def test_what_is_saved_is_the_mean_over_starts_with_its_standard_error():
    saved = Saved.over([(0.1, 1.0), (0.3, 1.0), (0.2, 1.0)])
    assert saved.ms == pytest.approx(0.2)
    assert saved.error_ms == pytest.approx(0.1 / math.sqrt(3))
    assert (saved.predicted_ms, saved.predicted_error_ms) == (1.0, 0.0)


def test_the_ways_are_given_kernels_and_what_was_asked_for_stays():
    config = Config(max_size=8, split_points=[4], compile_sizes=[1])
    given = settled(config)
    assert given.linear == {"1-1": "packed", "1-4": "packed", "5-8": "packed"}
    assert given.attention == {"1-1": "rowwise", "1-4": "rowwise", "5-8": "rowwise"}
    asked = Config(max_size=8, linear="inductor", attention={"1-8": "torch"})
    assert settled(asked) == asked
