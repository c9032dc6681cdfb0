"""Generating and timing it, on a tiny model: what is counted, compared, left out and written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from splitpoint import Config
from splitpoint.bench import generate, gguf_file
from splitpoint.bench.answer import Sampling, answer, check_length, prompt_ids
from splitpoint.bench.decoder import prepare
from splitpoint.bench.generate import GAPS, checked, random_prompts, run, step_bytes
from splitpoint.bench.generate_report import Divergence
from splitpoint.bench.generators import GENERATORS, Generator, Run, Setting
from splitpoint.cli.arguments import shared
from splitpoint.errors import BaselineFailed, OutputMismatch, UsageError
from splitpoint.integrations import transformers as integration
from splitpoint.tuning.measure import WALL_TIME

from .. import tiny

CONFIG = Config(max_size=16, split_points=[4], backend="eager")
MOST = GAPS[torch.float32]
IDS = torch.tensor([[3, 1, 4, 1, 5]])


class TestAnswer:
    def test_tokens_and_their_times(self):
        model = tiny.model()
        model.generation_config.eos_token_id = None
        found = answer(model, IDS, 4)
        expected = model.generate(IDS, max_new_tokens=4, do_sample=False)[0, 5:].tolist()
        assert found.tokens == expected
        assert (found.prompt_tokens, len(found.at_s)) == (5, 4)
        assert found.at_s == sorted(found.at_s)
        assert found.first_token_s == found.at_s[0]
        assert math.isclose(found.tokens_per_s, 3 / (found.at_s[3] - found.at_s[0]))

    def test_one_token_has_no_rate(self):
        assert answer(tiny.model(), IDS, 1).tokens_per_s is None

    def test_what_is_drawn_goes_by_the_seed(self):
        model = tiny.model()
        drawn = [answer(model, IDS, 8, sampling=Sampling(1.0, seed)).tokens for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_the_text_comes_as_it_is_made(self, tokenizer):
        model, pieces = tiny.model(), []
        found = answer(model, IDS, 4, tokenizer=tokenizer, write=pieces.append)
        assert "".join(pieces).split() == tokenizer.decode(found.tokens).split()

    def test_more_than_there_are_positions(self):
        with pytest.raises(UsageError, match="exceed the 256 positions of tiny"):
            check_length(tiny.model(), "tiny", 200, 57)
        check_length(tiny.model(), "tiny", 200, 56)


@pytest.fixture
def tokenizer(tmp_path: Path):
    from transformers import AutoTokenizer

    tiny.save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


class TestPrompt:
    def test_by_template_or_not(self, tokenizer):
        assert prompt_ids(tokenizer, "b").tolist() == [[2]]
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        assert prompt_ids(tokenizer, "a").tolist() == [[1]]
        assert prompt_ids(tokenizer, "a", raw=True).tolist() == [[1]]

    def test_an_empty_one(self, tokenizer):
        with pytest.raises(UsageError, match="no tokens"):
            prompt_ids(tokenizer, "", raw=True)


def test_what_was_prepared_is_counted():
    model = tiny.model()
    prepared = prepare(model, CONFIG)
    assert integration.decoder_of(model).body.stats().captures == 1
    assert prepared.compiled + prepared.loaded >= 0
    assert str(prepared).startswith(f"{prepared.compiled} pieces compiled, {prepared.loaded} ")


class TestChecked:
    def test_the_same(self):
        assert checked("x", tiny.model(), IDS, [[7, 8]], [[7, 8]], MOST) is None

    def test_a_tie_is_no_mistake(self):
        model = tiny.model()
        torch.nn.init.zeros_(model.lm_head.weight)
        expected, found = [[7, 8, 9]], [[7, 3, 9]]
        model.lm_head.weight[:64] = 1e-3  # some spread, and ties within both halves
        divergence = checked("x", model, IDS, expected, found, MOST)
        assert divergence == Divergence(1, pytest.approx(0.0, abs=1e-3))

    def test_another_token_is(self):
        model = tiny.model()
        logits = model(input_ids=IDS).logits[0, -1]
        best, worst = int(logits.argmax()), int(logits.argmin())
        with pytest.raises(OutputMismatch, match="other is wrong: after 0 tokens"):
            checked("other", model, IDS, [[best]], [[worst]], MOST)

    def test_the_worst_row_decides(self):
        model = tiny.model()
        logits = model(input_ids=IDS).logits[0, -1]
        best, worst = int(logits.argmax()), int(logits.argmin())
        with pytest.raises(OutputMismatch):
            checked("x", model, IDS.expand(2, -1), [[best]] * 2, [[best], [worst]], MOST)


def test_bytes_of_a_step():
    model = tiny.model()
    weights = sum(p.nbytes for p in model.parameters())  # tied: the embedding is the head
    token = 2 * tiny.LAYERS * 2 * (tiny.HIDDEN // 4) * 4
    assert step_bytes(model, 3, 10.5) == weights + 3 * 10.5 * token


class TestRun:
    def test_ours_beside_eager_and_what_is_missing(self, monkeypatch, tmp_path: Path):
        absent = Generator("llamacpp", "x", GENERATORS["llamacpp"].build, "no_such_module", "abc")
        monkeypatch.setitem(GENERATORS, "llamacpp", absent)
        report = run(
            tiny.model(),
            "tiny",
            CONFIG,
            prompts=[20, 3],
            new_tokens=6,
            batches=[1, 3],
            entrants=["eager", "llamacpp", "ours"],
            rounds=1,
        )
        cells = [(row.prompt, row.batch, row.name) for row in report.rows]
        assert cells == [(p, b, n) for p in (20, 3) for b in (1, 3) for n in ("eager", "ours")]
        for row in report.rows:
            assert row.divergence is None
            assert row.first.ms > 0
            assert row.step.ms > 0
            assert row.tokens_per_s == row.batch / row.step.ms * 1e3
        notes = report.environment["notes"]
        assert notes == ["llamacpp was left out: abc is not installed: pip install abc."]
        text = str(report)
        assert notes[0] in text
        assert max(map(len, text.splitlines())) <= 120
        data = json.loads(report.to_json())
        assert [row["name"] for row in data["rows"]] == ["eager", "ours"] * 4
        assert data["environment"]["threads"] == 1
        report.save_picture(tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_an_entrant_that_fails_is_left_out_and_ours_is_not(self, monkeypatch):
        def wrong(ids, new_tokens):
            return Run([[0] * new_tokens for _ in ids], 1.0, 1.0)

        monkeypatch.setitem(GENERATORS, "openvino", Generator("openvino", "x", lambda _: wrong))
        how = {"prompts": [3], "new_tokens": 3, "batches": [1], "rounds": 1}
        report = run(tiny.model(), "tiny", CONFIG, entrants=["openvino", "eager"], **how)
        assert [row.name for row in report.rows] == ["eager"]
        assert "openvino was left out at 1 x 3 tokens: openvino is wrong" in str(report)
        monkeypatch.setitem(GENERATORS, "ours", Generator("ours", "x", lambda _: wrong))
        with pytest.raises(OutputMismatch, match="ours is wrong"):
            run(tiny.model(), "tiny", CONFIG, entrants=["ours"], **how)

    def test_one_that_cannot_be_prepared(self, monkeypatch):
        def build(setting):
            raise BaselineFailed("it cannot")

        monkeypatch.setitem(GENERATORS, "openvino", Generator("openvino", "x", build))
        report = run(
            tiny.model(), "tiny", CONFIG,
            entrants=["openvino", "eager"], prompts=[3], new_tokens=2, batches=[1], rounds=1,
        )  # fmt: skip
        assert report.environment["notes"][0] == "openvino was left out: it cannot."

    def test_what_is_asked_for(self):
        with pytest.raises(UsageError, match="no entrant 'x': choose from eager"):
            run(tiny.model(), "tiny", CONFIG, entrants=["x"])
        with pytest.raises(UsageError, match="2 or more"):
            run(tiny.model(), "tiny", CONFIG, new_tokens=1)
        with pytest.raises(UsageError, match="256 positions"):
            run(tiny.model(), "tiny", CONFIG, prompts=[250], new_tokens=7)


def test_prompts_are_the_same_each_time():
    first = random_prompts(128, 2, 9)
    assert torch.equal(first, random_prompts(128, 2, 9))
    assert first.shape == (2, 9)


def test_names_are_those_of_the_command_line():
    assert tuple(GENERATORS) == shared.GENERATORS
    assert set(generate.GAPS) == {torch.float32, torch.bfloat16}


@pytest.mark.slow
def test_static_is_compiled():
    model = tiny.model()
    model.generation_config.eos_token_id = None
    setting = Setting(model, "tiny", CONFIG, 1, WALL_TIME)
    found = GENERATORS["static"].build(setting)(IDS, 4)
    assert found.tokens == GENERATORS["eager"].build(setting)(IDS, 4).tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


class TestGguf:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_same_weights(self, dtype, tmp_path: Path, monkeypatch):
        gguf = pytest.importorskip("gguf")
        monkeypatch.setattr(gguf_file, "cache_folder", lambda: tmp_path)
        model = tiny.model(dtype)
        path = gguf_file.gguf_of(model, "tiny")
        assert path == gguf_file.gguf_of(model, "tiny")
        tensors = {each.name: each for each in gguf.GGUFReader(str(path)).tensors}
        assert len(tensors) == len(list(model.parameters()))  # the head is the embedding

        def values(name):
            tensor = tensors[name]
            return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))

        layer = model.model.layers[1]
        assert torch.equal(values("blk.1.ffn_down.weight"), layer.mlp.down_proj.weight.float())
        # Of each head, row i and row i + half rotate together, and stand side by side there.
        query, half = layer.self_attn.q_proj.weight.float(), tiny.HIDDEN // 4 // 2
        assert torch.equal(values("blk.1.attn_q.weight")[:2], query[[0, half]])

    @pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127), ("Q4_0", 8)])
    def test_weights_in_fewer_bits(self, kind, steps, tmp_path: Path, monkeypatch):
        gguf = pytest.importorskip("gguf")
        monkeypatch.setattr(gguf_file, "cache_folder", lambda: tmp_path)
        model = tiny.model()
        path = gguf_file.gguf_of(model, "tiny", kind)
        assert path != gguf_file.gguf_of(model, "tiny")
        tensors = {each.name: each for each in gguf.GGUFReader(str(path)).tensors}
        found = tensors["blk.1.ffn_down.weight"]
        assert found.tensor_type.name == kind
        assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
        weight = model.model.layers[1].mlp.down_proj.weight.detach()
        blocks = weight.reshape(-1, 32)
        made = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type)).reshape(-1, 32)
        # The scale of a block is rounded to fp16, and in 4 bits one end is a step short.
        step = blocks.abs().amax(dim=1, keepdim=True) / steps
        assert ((made - blocks).abs() <= 1.05 * step).all()

    def test_other_weights_are_another_file(self, tmp_path: Path, monkeypatch):
        pytest.importorskip("gguf")
        monkeypatch.setattr(gguf_file, "cache_folder", lambda: tmp_path)
        model = tiny.model()
        first = gguf_file.gguf_of(model, "tiny")
        model.model.norm.weight += 1
        assert gguf_file.gguf_of(model, "tiny") != first

    def test_other_models_and_no_package(self, monkeypatch):
        model = tiny.model()
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(BaselineFailed, match="pip install gguf"):
            gguf_file.gguf_of(model, "tiny")
        model.config.model_type = "other"
        with pytest.raises(BaselineFailed, match="only models of type llama"):
            gguf_file.gguf_of(model, "tiny")


@pytest.mark.parametrize("batch", [1, 3])
def test_llamacpp_says_what_eager_does(batch, tmp_path: Path, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(gguf_file, "cache_folder", lambda: tmp_path)
    model = tiny.model()
    model.generation_config.eos_token_id = None
    setting = Setting(model, "tiny", CONFIG, 1, WALL_TIME)
    ids = random_prompts(tiny.VOCABULARY, batch, 9)
    found = GENERATORS["llamacpp"].build(setting)(ids, 6)
    expected = GENERATORS["eager"].build(setting)(ids, 6)
    checked("llamacpp", model, ids, expected.tokens, found.tokens, MOST)
