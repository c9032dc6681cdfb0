"""compile(): right results at every size, or the documented error."""

import dataclasses
import inspect
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import splitpoint
from splitpoint import Config, errors

SMALL = Config(max_size=64, split_points=[8], compile_sizes=[16])


class Block(torch.nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.tensor(2.0))
        self.flag = True

    def forward(self, x):
        return x + self.scale * self.down(F.silu(self.up(x)))


def same(compiled, reference, sizes, make, **tolerance):
    for size in sizes:
        args = make(size)
        expected = reference(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])
        torch.testing.assert_close(compiled(*args), expected, **tolerance)


# --- models that break others ----------------------------------------------------------


def two(x, y):
    return x * y + x.sum()


def with_size_as_value(x):
    return x * x.shape[0] + torch.arange(x.shape[0])[:, None] / x.shape[0]


def branching(x):
    return x * 2 if x.shape[0] > 20 else x + 1


def even_and_odd(x):
    return x * 2 if x.shape[0] % 2 == 0 else x + 1


def rows(*shape):
    return lambda size: (torch.randn(size, *shape),)


SERVED = {
    "sum over rows": (lambda x: x.sum(0), rows(4), None),
    "branch on the size": (branching, rows(4), None),
    "branch on the size's parity": (even_and_odd, rows(4), None),
    "size as a value": (with_size_as_value, rows(4), None),
    "two inputs share the size": (two, lambda n: (torch.randn(n, 4), torch.randn(n, 4)), None),
    "static dimension equals a size": (
        lambda x, w: x @ w,
        lambda n: (torch.randn(n, 16), torch.randn(16, 16)),
        {"x": 0},
    ),
    "size in two dimensions": (
        lambda x, mask: (x @ x.t()).masked_fill(mask, 0.0),
        lambda n: (torch.randn(n, 4), torch.ones(n, n).tril().bool()),
        {"x": 0, "mask": (0, 1)},
    ),
    "size as an integer argument": (
        lambda x, n: x[:n] * n + n,
        lambda n: (torch.randn(n, 4), n),
        {"x": 0, "n": None},
    ),
    "size in the last dimension": (
        lambda x: torch.softmax(x, -1) @ x.t(),
        lambda n: (torch.randn(4, n),),
        {"x": 1},
    ),
    "transposed argument": (
        lambda x: x * 2 + x.sum(0),
        lambda n: (torch.randn(4, n).t(),),
        None,
    ),
    "rows of a wider buffer": (
        lambda x: x * 2,
        lambda n: (torch.randn(n, 8)[:, :4],),
        None,
    ),
    "views of the argument": (lambda x: (x.view(-1), x[:, :2], x.t()), rows(4), None),
    "derived sizes": (lambda x: torch.cat([x, x]).view(2, -1).sum(1), rows(4), None),
}


@pytest.mark.parametrize("name", SERVED)
def test_right_at_every_size(name):
    function, make, dims = SERVED[name]
    compiled = splitpoint.compile(function, SMALL, dynamic_dims=dims)
    order = [5, 1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 21, 31, 32, 33, 63, 64]
    same(compiled, function, order, make, rtol=1e-4, atol=1e-4)
    assert sum(compiled.stats().dispatches.values()) == len(order)


def test_sum_over_more_rows_than_the_compilers_chunk():
    compiled = splitpoint.compile(lambda x: x.sum(0), Config(max_size=8192, split_points=[32]))
    same(compiled, lambda x: x.sum(0), [5, 4095, 4096, 4097, 8192], rows(4), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("first", [5, 20, 21, 64, 1])
def test_a_branch_becomes_two_ranges_whichever_side_comes_first(first):
    compiled = splitpoint.compile(branching, Config(max_size=64, split_points=[8]))
    same(compiled, branching, [first, 1, 8, 9, 20, 21, 64], rows(4))
    assert [str(r) for r in compiled.plan.ranges] == ["[1,8]", "[9,20]", "[21,64]"]
    assert compiled.stats().captures == 2
    notes = [entry.note for entry in compiled.plan.entries]
    assert notes[0] == ""
    assert all("test_api.py" in note and "20" in note for note in notes[1:])


def test_a_branch_at_a_split_point_splits_nothing():
    compiled = splitpoint.compile(
        branching, Config(max_size=64, split_points=[20], on_guard="error")
    )
    same(compiled, branching, [20, 21, 1, 64], rows(4))
    assert [str(r) for r in compiled.plan.ranges] == ["[1,20]", "[21,64]"]


def test_on_guard_error_names_the_line_and_the_split_point():
    compiled = splitpoint.compile(branching, Config(max_size=64, on_guard="error"))
    with pytest.raises(errors.GuardError, match=r"20.*test_api\.py.*split point at 20"):
        compiled(torch.randn(5, 4))


def test_interleaved_branches_share_one_range_each():
    compiled = splitpoint.compile(even_and_odd, Config(max_size=64))
    same(compiled, even_and_odd, range(1, 65), rows(4))
    assert [str(r) for r in compiled.plan.ranges] == ["[1,63]", "[2,64]"]
    assert compiled.stats().compilations == 2


def test_sizes_that_the_model_itself_refuses():
    def f(x):
        return x.view(-1, 16).sum(1)

    compiled = splitpoint.compile(f, Config(max_size=64, split_points=[32]))
    same(compiled, f, [32, 16, 48, 64], rows())
    for size in (1, 8, 17, 63):
        with pytest.raises(errors.SizeNotServed, match=rf"size {size} .*size % 16"):
            compiled(torch.randn(size))
    assert "refused" in str(compiled.plan)


def test_a_first_call_that_the_model_refuses_spoils_nothing():
    def f(x):
        return x.view(-1, 16).sum(1)

    compiled = splitpoint.compile(f, Config(max_size=64))
    with pytest.raises(errors.CaptureError, match="size 17"):
        compiled(torch.randn(17))
    same(compiled, f, [32], rows())


def test_a_loop_over_the_size_is_refused_with_its_line():
    def f(x):
        return sum((x[i] for i in range(x.shape[0])), x[0])

    with pytest.raises(errors.SizeSpecialized, match=r"test_api\.py"):
        splitpoint.compile(f, Config(max_size=64))(torch.randn(5, 4))
    few = splitpoint.compile(f, Config(max_size=4))
    same(few, f, [3, 1, 2, 4], rows(4))


@pytest.mark.parametrize(
    "function", [lambda x: x[: int(x.sum())], lambda x: x.nonzero() * 2, lambda x: x[x > 0]]
)
def test_data_dependent_shapes_are_refused(function):
    with pytest.raises(errors.CaptureError):
        splitpoint.compile(function, Config(max_size=8, on_break="error"))(torch.randn(3, 2))


def test_size_0_runs_the_model_itself():
    compiled = splitpoint.compile(lambda x: torch.cat([x, x]).sum(1), SMALL)
    same(compiled, lambda x: torch.cat([x, x]).sum(1), [0, 5, 0, 1], rows(4))
    assert compiled.stats().eager_calls == 2


def test_no_recompile_after_warm_up():
    from torch._dynamo.utils import counters

    model = Block().eval()
    compiled = splitpoint.compile(model, Config(max_size=200, split_points=[8, 64]))
    compiled(torch.randn(5, 16))
    before = compiled.stats().compilations
    counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        same(compiled, model, range(1, 201), rows(16))
    assert not counters["stats"]
    assert not counters["inductor"]
    assert compiled.stats().compilations == before
    assert compiled.stats().captures == 1


# --- calling convention ----------------------------------------------------------------


def nested(x, /, pair, *rest, flag=True, scale=2.0, **named):
    a, b = pair["a"], pair["b"][0]
    y = x * scale + a if flag else x - a
    return {"y": [y + rest[0], b], "n": (named["z"] + 1, x.shape[0]), "x": x, "none": None}


NESTED_DIMS = {"x": 0, "pair['a']": 0, "rest": 0}


def nested_call(size):
    args = (
        torch.randn(size, 4),
        {"a": torch.randn(size, 4), "b": (torch.randn(3),)},
        torch.randn(size, 4),
    )
    return args, {"z": torch.randn(2), "other": "text"}


def test_kwargs_and_pytrees_in_and_out():
    compiled = splitpoint.compile(nested, SMALL, dynamic_dims=NESTED_DIMS)
    for size in (5, 1, 8, 9, 16, 64):
        args, kwargs = nested_call(size)
        result = compiled(*args, **kwargs)
        torch.testing.assert_close(result, nested(*args, **kwargs))
        assert result["x"] is args[0]
        assert result["n"][1] == size
    other_order = dict(reversed(kwargs.items()))
    torch.testing.assert_close(compiled(*args, **other_order), nested(*args, **kwargs))


def _swap(index, value):
    def change(args, kwargs):
        return (*args[:index], value, *args[index + 1 :]), kwargs

    return change


WRONG_CALLS = [
    (lambda a, k: (a, k | {"flag": False}), errors.WrongValue, "flag was True.*got False"),
    (lambda a, k: (a, k | {"scale": 3.0}), errors.WrongValue, r"scale was 2\.0.*got 3\.0"),
    (lambda a, k: (a, k | {"scale": 2}), errors.WrongValue, "scale"),
    (lambda a, k: (a, k | {"other": "more"}), errors.WrongValue, r"named\['other'\]"),
    (lambda a, k: (a, k | {"z": 3}), errors.WrongArguments, r"named\['z'\] must be a tensor"),
    (lambda a, k: (a, {"z": k["z"]}), errors.WrongArguments, "missing 'other'"),
    (lambda a, k: (a, k | {"new": 1}), errors.WrongArguments, "unexpected 'new'"),
    (lambda a, k: ((*a, a[2]), k), errors.WrongArguments, "rest: expected 1 elements.*got 2"),
    (lambda a, k: ((), k), errors.WrongArguments, "missing"),
    (_swap(1, {"a": torch.randn(9, 4), "b": [torch.randn(3)]}), errors.WrongArguments, "tuple"),
    (_swap(0, torch.randn(9, 4).double()), errors.WrongDtype, "x: expected dtype torch.float32"),
    (_swap(0, torch.randn(9, 4, device="meta")), errors.WrongDevice, "expected device cpu"),
    (_swap(0, torch.randn(9)), errors.WrongRank, r"x: .*\[size, 4\], got \[9\]"),
    (_swap(0, torch.randn(9, 5)), errors.WrongDimension, "x: expected dimension 1 to be 4, got 5"),
    (_swap(0, torch.randn(4, 9).t()), errors.WrongStrides, r"x: expected strides \(4, 1\)"),
    (_swap(2, torch.randn(8, 4)), errors.SizeMismatch, r"rest\[0\]\.shape\[0\] is 8"),
    (
        _swap(0, torch.randn(9, 4, requires_grad=True)),
        errors.GradientRequired,
        r"x requires gradients",
    ),
]


@pytest.mark.parametrize(("change", "error", "said"), WRONG_CALLS)
def test_a_call_that_does_not_fit_says_which_argument_and_why(change, error, said):
    config = replace(SMALL, max_signatures=1)
    compiled = splitpoint.compile(nested, config, dynamic_dims=NESTED_DIMS)
    args, kwargs = nested_call(9)
    compiled(*args, **kwargs)
    wrong_args, wrong_kwargs = change(args, kwargs)
    with pytest.raises(error, match=said) as caught:
        compiled(*wrong_args, **wrong_kwargs)
    assert isinstance(caught.value, errors.InputError)
    torch.testing.assert_close(compiled(*args, **kwargs), nested(*args, **kwargs))


def test_the_same_tensor_passed_twice_at_first_is_not_assumed_later():
    compiled = splitpoint.compile(two, SMALL)
    x = torch.randn(5, 4)
    compiled(x, x)
    same(compiled, two, [5, 9], lambda n: (torch.randn(n, 4), torch.randn(n, 4)))


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({"nothing": 0}, "names nothing, but the call's arguments are x, w"),
        ({"x": 2}, "is 2, but x has 2 dimensions"),
        ({"x": None}, "x is a tensor"),
        ({"x": 0, "w": 0}, r"x.shape\[0\] = 5, w.shape\[0\] = 4"),
        ({}, "no tensor argument has a dynamic dimension"),
        (None, r"x.shape\[0\] = 5, w.shape\[0\] = 4.*dynamic_dims="),
    ],
)
def test_dynamic_dims_that_cannot_be(dims, said):
    compiled = splitpoint.compile(lambda x, w: x @ w, SMALL, dynamic_dims=dims)
    with pytest.raises(errors.InvalidDynamicDims, match=said):
        compiled(torch.randn(5, 4), torch.randn(4, 4))


def test_dynamic_dims_of_plain_values():
    for dims, said in (({"x": 0, "n": 0}, "only tensors have"), ({"x": 0, "n": None}, "integer")):
        compiled = splitpoint.compile(lambda x, n: x, SMALL, dynamic_dims=dims)
        with pytest.raises(errors.InvalidDynamicDims, match=said):
            compiled(torch.randn(5, 4), 2.5)


def test_size_out_of_plan():
    for first in (65, 5):
        compiled = splitpoint.compile(lambda x: x * 2, SMALL)
        if first == 5:
            compiled(torch.randn(5, 4))
        with pytest.raises(errors.SizeOutOfPlan, match=r"65 .*\[1,64\].*max_size.*on_out_of_plan"):
            compiled(torch.randn(65, 4))
    lenient = splitpoint.compile(lambda x: x * 2, Config(max_size=8, on_out_of_plan="eager"))
    same(lenient, lambda x: x * 2, [9, 3, 9], rows(4))
    assert lenient.stats().eager_calls == 2


def test_tensor_subclasses_are_refused():
    sparse = torch.eye(4).to_sparse()
    with pytest.raises(errors.WrongArguments, match=r"x is a Tensor with layout torch\.sparse_coo"):
        splitpoint.compile(lambda x: x, SMALL)(sparse)


@pytest.mark.parametrize(
    ("module", "config"),
    [(3, None), (Block(), {"max_size": 8}), (Block(), "auto")],
)
def test_compile_refuses(module, config):
    with pytest.raises(errors.ConfigError):
        splitpoint.compile(module, config)


def test_compile_of_a_compiled_model_is_refused():
    with pytest.raises(errors.ConfigError, match=r"\.module"):
        splitpoint.compile(splitpoint.compile(Block()))


def test_unknown_inductor_option_suggests_the_known_one():
    with pytest.raises(errors.UnknownInductorOption, match="did you mean 'max_autotune'"):
        splitpoint.compile(Block(), Config(inductor_options={"max_autotuned": True}))


def test_unknown_splitting_op():
    compiled = splitpoint.compile(Block(), Config(splitting_ops=["nowhere::attention"]))
    with pytest.raises(errors.UnknownSplittingOp, match="nowhere::attention"):
        compiled(torch.randn(3, 16))


# --- the module ------------------------------------------------------------------------


def test_a_compiled_module_is_the_same_module():
    module = Block()
    compiled = splitpoint.compile(module, SMALL)
    assert compiled.state_dict().keys() == module.state_dict().keys()
    assert compiled.up is module.up
    assert compiled.eval() is compiled
    assert not module.training
    assert compiled.to(torch.float64) is compiled
    assert module.up.weight.dtype == torch.float64
    compiled.flag = False
    assert module.flag is False
    assert sum(p.numel() for p in compiled.parameters()) == sum(
        p.numel() for p in module.parameters()
    )
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), module(x))
    with pytest.raises(AttributeError):
        compiled.no_such_thing


def test_a_compiled_function_keeps_its_name_and_signature():
    compiled = splitpoint.compile(nested)
    assert compiled.__name__ == "nested"
    assert inspect.signature(compiled) == inspect.signature(nested)


def test_a_bound_method_is_compiled_with_its_module():
    module = Block().eval()
    compiled = splitpoint.compile(module.forward, SMALL)
    same(compiled, module, [5, 16], rows(16))
    with torch.no_grad():
        module.up.weight.add_(1.0)
    same(compiled, module, [5, 16], rows(16))


def _in_place(module):
    with torch.no_grad():
        module.up.weight.mul_(2)
        module.scale.add_(1)


def _load(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def _load_assign(module):
    state = {k: v + 1 for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(True)


def _data(module):
    module.up.weight.data = torch.randn(32, 16)


def _replace_parameter(module):
    module.up.weight = torch.nn.Parameter(torch.randn(32, 16))


def _replace_module(module):
    module.up = torch.nn.Linear(16, 32).eval()


@pytest.mark.parametrize(
    "change", [_in_place, _load, _load_assign, _data, _replace_parameter, _replace_module]
)
def test_new_weights_are_used(change):
    module = Block().eval()
    compiled = splitpoint.compile(module, SMALL)
    same(compiled, module, [5, 9, 16], rows(16))
    before = module(torch.ones(5, 16))
    change(module)
    assert not torch.equal(module(torch.ones(5, 16)), before)
    same(compiled, module, [5, 9, 16], rows(16))
    assert compiled.stats().captures == 1


def _to(module):
    module.to(torch.float64)


def _train(module):
    module.train()


def _reshape(module):
    module.up = torch.nn.Linear(16, 8)


def _drop(module):
    del module.scale
    module.scale = 3.0


@pytest.mark.parametrize("change", [_to, _reshape, _drop])
def test_a_changed_module_is_refused_and_reset_mends_it(change):
    module = Block().eval()
    compiled = splitpoint.compile(module, SMALL)
    compiled(torch.randn(5, 16))
    change(module)
    with pytest.raises(errors.StateChanged, match=r"reset\(\)"):
        compiled(torch.randn(5, 16))
    if change is _drop:
        compiled.reset()
        same(compiled, module, [5, 9], rows(16))


def test_dropout_of_a_training_module_is_not_frozen_into_eval():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5)).eval()
    compiled = splitpoint.compile(module, SMALL)
    same(compiled, module, [5], rows(16))
    module.train()
    with pytest.raises(errors.StateChanged, match="training"):
        compiled(torch.randn(5, 16))


def test_first_call_guards_leave_the_module_unchecked():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).eval()
    compiled = splitpoint.compile(module, Config(max_size=8, module_guards="first_call"))
    x = torch.randn(5, 4)
    expected = module(x)
    compiled(x)
    module.train()
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        module[0].weight.zero_()
    torch.testing.assert_close(compiled(x), module[0](x))


def test_globals_and_closures_that_hold_tensors():
    weight = torch.randn(4, 4)

    def f(x):
        return x @ weight

    compiled = splitpoint.compile(f, SMALL)
    same(compiled, f, [5, 9], rows(4))
    weight = torch.randn(4, 4)
    same(compiled, f, [5, 9], rows(4))
    weight = torch.randn(4, 5)
    with pytest.raises(errors.StateChanged):
        compiled(torch.randn(5, 4))


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.seen = []

    def forward(self, x, what):
        if what == "attribute":
            self.calls += 1
        elif what == "list":
            self.seen.append(x)
        else:
            what["x"] = x
        return x + 1


@pytest.mark.parametrize("what", ["attribute", "list", {}])
def test_side_effects_are_refused(what):
    module = Counting()
    config = dataclasses.replace(SMALL, on_break="error")
    with pytest.raises(errors.SideEffect, match="Return the value instead"):
        splitpoint.compile(module, config)(torch.randn(5, 4), what)
    assert (module.calls, module.seen) == (0, [])


class Cached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(128, 4))

    def forward(self, x, positions):
        self.keys[positions] = x
        return self.keys.sum(0) + x


def test_buffers_updated_in_place():
    ours, theirs = Cached(), Cached()
    compiled = splitpoint.compile(ours, SMALL)
    for size in (5, 1, 9, 64, 16, 3):
        x, positions = torch.randn(size, 4), torch.randperm(128)[:size]
        torch.testing.assert_close(compiled(x, positions), theirs(x, positions))
        assert torch.equal(ours.keys, theirs.keys)


def test_arguments_updated_in_place():
    def f(x, out):
        out.add_(x)
        return out * 2

    compiled = splitpoint.compile(f, SMALL)
    for size in (5, 1, 9, 16):
        x, out = torch.randn(size, 4), torch.randn(size, 4)
        expected_out = out.clone()
        expected = f(x, expected_out)
        torch.testing.assert_close(compiled(x, out), expected)
        assert torch.equal(out, expected_out)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")]
)
def test_modes_around_a_call(mode):
    module = Block().eval()
    compiled = splitpoint.compile(module, SMALL)
    with mode():
        for size in (5, 9):
            x = torch.randn(size, 16)
            result = compiled(x)
            assert not result.requires_grad
            torch.testing.assert_close(result, module(x), check_dtype=True)
            assert torch.is_grad_enabled() is (mode not in (torch.no_grad, torch.inference_mode))


def test_a_mode_may_differ_from_that_of_the_first_call():
    module = Block().eval()
    compiled = splitpoint.compile(module, SMALL)
    with torch.inference_mode():
        same(compiled, module, [5], rows(16))
    with torch.no_grad():
        same(compiled, module, [5], rows(16))
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(x), module(x))


# --- compiling -------------------------------------------------------------------------


def test_lazy_compiles_a_range_at_its_first_call():
    module = Block().eval()
    config = Config(max_size=64, split_points=[8, 32], lazy=True)
    compiled = splitpoint.compile(module, config)
    same(compiled, module, [5], rows(16))
    assert compiled.stats().compilations == 1
    same(compiled, module, [8, 1, 33], rows(16))
    assert compiled.stats().compilations == 2
    same(compiled, module, [9], rows(16))
    assert compiled.stats().compilations == 3


@pytest.mark.parametrize("guards", ["every_call", "first_call"])
def test_a_range_compiled_late_uses_the_tensors_that_the_module_holds_then(guards):
    module = Block().eval()
    config = Config(max_size=64, split_points=[8], lazy=True, module_guards=guards)
    compiled = splitpoint.compile(module, config)
    same(compiled, module, [5], rows(16))
    for name, parameter in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        fresh = torch.nn.Parameter(torch.randn_like(parameter))
        setattr(module.get_submodule(owner), last, fresh)
    same(compiled, module, [20, 5], rows(16))


def test_threads_that_call_at_once_compile_once():
    module = Block().eval()
    compiled = splitpoint.compile(module, Config(max_size=64, split_points=[8], lazy=True))
    wrong = []

    def work(size):
        x = torch.randn(size, 16)
        with torch.no_grad():
            if not torch.allclose(compiled(x), module(x), atol=1e-5):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 9, 5, 64) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert compiled.stats().compilations == 2


def test_eager_backend_compiles_nothing():
    module = Block().eval()
    compiled = splitpoint.compile(module, Config(max_size=64, split_points=[8], backend="eager"))
    same(compiled, module, [5, 9, 64], rows(16), rtol=0, atol=0)
    assert compiled.stats().compilations == 0


@pytest.mark.parametrize("hint", ["start", "middle", "end"])
def test_hints_change_no_result(hint):
    module = Block().eval()
    compiled = splitpoint.compile(module, Config(max_size=64, split_points=[8], hint=hint))
    same(compiled, module, [1, 8, 9, 64], rows(16))


def test_stats_and_plan_print():
    compiled = splitpoint.compile(Block().eval(), SMALL)
    assert "not called yet" in repr(compiled)
    assert str(compiled.plan).count("\n") == 4  # the last line is a note
    same(compiled, compiled.module, [5, 5, 16], rows(16))
    assert "[1,8]" in str(compiled.stats())
    assert compiled.stats().dispatches[splitpoint.Range(1, 8)] == 2
    assert "compiled, 3 ranges" in repr(compiled)


def test_autocast_inside_the_model_around_a_splitting_op():
    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = (x @ x.t())[None, None]
            return F.scaled_dot_product_attention(h, h, h)

    compiled = splitpoint.compile(f, SMALL)
    same(compiled, f, [5, 9], rows(4), rtol=2e-2, atol=2e-2)


def test_methods_that_would_call_the_model_past_the_compiled_one_say_what_to_do():
    class Generates(torch.nn.Linear):
        def generate(self, x):
            return self(x)

    compiled = splitpoint.compile(Generates(4, 4), SMALL)
    assert hasattr(compiled, "generate")
    with pytest.raises(errors.CaptureError, match=r"integrations\.transformers\.compile"):
        compiled.generate(torch.randn(3, 4))


def test_splitting_ops_are_found_as_methods_and_missed_by_name(caplog):
    cache = torch.zeros(32, 4)

    def f(x, at):
        y = x * 2
        cache.index_copy_(0, at, y)
        return cache.sum(0) + y.sum(0)

    names = ["aten::index_copy_", "aten::logcumsumexp"]
    compiled = splitpoint.compile(f, dataclasses.replace(SMALL, splitting_ops=names))
    for size in (5, 1, 8, 9):
        x, at = torch.randn(size, 4), torch.randperm(32)[:size]
        with torch.no_grad():
            expected = cache.clone().index_copy(0, at, x * 2).sum(0) + (x * 2).sum(0)
            torch.testing.assert_close(compiled(x, at), expected)
    assert compiled.stats().pieces >= 2
    said = [each.getMessage() for each in caplog.records if "splitting_ops" in each.getMessage()]
    assert said == ["splitting_ops names aten::logcumsumexp, which the model does not call"]


# --- torch.compile(backend="splitpoint") -----------------------------------------------


def test_as_a_backend_of_torch_compile():
    module = Block().eval()
    compiled = torch.compile(
        module, backend="splitpoint", options={"max_size": 64, "split_points": [8]}
    )
    with torch.no_grad():
        for size in (5, 8, 9, 64):
            x = torch.randn(size, 16)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), module(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_as_a_backend_without_a_dynamic_size():
    module = Block().eval()
    compiled = torch.compile(module, backend="splitpoint", dynamic=False)
    with torch.no_grad():
        x = torch.randn(7, 16)
        torch.testing.assert_close(compiled(x), module(x))


def test_as_a_backend_with_a_size_out_of_plan():
    module = Block().eval()
    compiled = torch.compile(module, backend="splitpoint", options={"max_size": 8})
    x = torch.randn(7, 16)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        with pytest.raises(errors.SizeOutOfPlan, match=r"9.*\[1,8\]"):
            compiled(torch.randn(9, 16))


def test_as_a_backend_with_wrong_options():
    compiled = torch.compile(Block(), backend="splitpoint", options={"max_sizes": 8})
    with pytest.raises(Exception, match="Config has no field 'max_sizes'"):
        compiled(torch.randn(7, 16))


def test_the_backend_takes_the_default_mode_and_refuses_others_by_name():
    module, x = Block().eval(), torch.randn(3, 16)
    assert torch.compile(module, backend="splitpoint", mode="default") is not None
    compiled = torch.compile(module, backend="splitpoint", mode="reduce-overhead")
    with torch.no_grad(), pytest.raises(Exception, match="mode='reduce-overhead' is Inductor's"):
        compiled(x)
