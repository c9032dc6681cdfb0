"""`splitpoint compile` and `splitpoint cache`, on a model small enough to compile here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitpoint import Config, compile
from splitpoint.cli.verbs import main
from splitpoint.store.store import Store
from tests import tiny

CONFIG = ["--max-size", "8", "--split-points", "", "--compile-sizes", ""]


def test_a_store_filled_without_weights_serves_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model")
    kept = str(tmp_path / "kept")
    store = ["--cache-dir", kept]
    task = [str(folder), *store, "--dtype", "fp32", *CONFIG]
    assert main(["cache", "why-miss", *task]) == 0
    assert "has no models" in capsys.readouterr().out
    assert main(["compile", *task]) == 0
    assert "pieces compiled, 0 found there" in capsys.readouterr().out
    assert main(["compile", *task]) == 0
    assert "0 pieces compiled" in capsys.readouterr().out
    assert main(["cache", "why-miss", *task]) == 0
    assert "no miss" in capsys.readouterr().out
    assert main(["cache", "why-miss", *task, "--max-size", "9"]) == 0
    said = capsys.readouterr().out
    assert "differs in 1 fields" in said
    assert "max_size: 8 there, 9 here" in said

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    compiled = compile(model, Config(max_size=8, cache_dir=kept), dynamic_dims={"input_ids": 1})
    for size in (5, 1, 8):
        call = {"input_ids": torch.arange(size)[None], "use_cache": False, "logits_to_keep": 1}
        torch.testing.assert_close(
            compiled(**call).logits, model(**call).logits, atol=1e-4, rtol=1e-4
        )
    assert compiled.stats().compilations == 0

    carried = str(tmp_path / "artifacts.tar")
    other = ["--cache-dir", str(tmp_path / "other")]
    assert main(["cache", "export", carried, *store]) == 0
    assert main(["cache", "import", carried, *other]) == 0
    assert main(["cache", "verify", *other]) == 0
    assert "all sound" in capsys.readouterr().out
    assert {e[:2] for e in Store(tmp_path / "other").entries()} == {
        e[:2] for e in Store(tmp_path / "kept").entries()
    }
    assert main(["cache", "list", *other]) == 0
    said = capsys.readouterr().out
    assert "range [1,1]" in said or "range [1,8]" in said
    assert main(["cache", "prune", "--max-size", "0", *other]) == 0
    assert not list(Store(tmp_path / "other").entries())
    assert not list(Store(tmp_path / "other").objects())


def test_verify_fails_on_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "kept")
    digest = store.write_object(b"something")
    store.object_path(str(digest)).write_bytes(b"else")
    assert main(["cache", "verify", "--cache-dir", str(store.folder)]) == 2
    captured = capsys.readouterr()
    assert "does not have the content" in captured.out
    assert "1 files" in captured.err


def test_import_leaves_out_what_is_not_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import tarfile

    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in {
            "../outside": b"x",
            "objects/ab/" + "ab" * 32: b"not its content",
            "models/ab/" + "ab" * 32 + ".json": b"0\n{}\n",
        }.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    assert main(["cache", "import", str(path), "--cache-dir", str(tmp_path / "kept")]) == 2
    assert "3 files" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()
    path.write_text("no tar")
    assert main(["cache", "import", str(path), "--cache-dir", str(tmp_path / "kept")]) == 2
