"""What a watch over a module tree sees, and that guards it does not cover are kept."""

import gc
import sys
import weakref

import pytest
import torch

import splitpoint
from splitpoint import Config, errors
from splitpoint.capture.module_state import held
from splitpoint.capture.reached import reach_tree
from splitpoint.capture.watch import watch

needs_tags = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="dicts have version tags in CPython 3.11 only"
)


class Model(torch.nn.Module):
    shift = 0.5

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("scale", torch.ones(4))
        self.factor = 2.0
        self.offsets = [1.0, 2.0]
        self.config = type("Config", (), {"bias": 1.0})()

    def forward(self, x):
        for layer, offset in zip(self.layers, self.offsets, strict=True):
            x = layer(x) * self.factor + offset
        return x * self.scale + self.config.bias + self.shift


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def _turned(model):
    return model.layers[0].weight.data.t()


CHANGES = {
    "attribute": lambda m: setattr(m, "factor", 3.0),
    "new attribute": lambda m: setattr(m.layers[1], "note", 1),
    "deleted attribute": lambda m: delattr(m, "factor"),
    "training": lambda m: m.layers[0].train(False),
    "parameter": lambda m: setattr(m.layers[0], "weight", torch.nn.Parameter(torch.eye(4))),
    "buffer": lambda m: setattr(m, "scale", torch.zeros(4)),
    "submodule": lambda m: m.layers.__setitem__(1, torch.nn.Linear(4, 4)),
    "data": lambda m: setattr(m.scale, "data", torch.zeros(4)),
    "dtype": lambda m: m.to(torch.float64),
    "view of the same memory": lambda m: setattr(m.scale, "data", m.scale.data[:2]),
    "strides of the same memory": lambda m: setattr(m.layers[0].weight, "data", _turned(m)),
    "dict": lambda m: setattr(m, "__dict__", dict(vars(m))),
    "class": lambda m: setattr(m.layers[0], "__class__", type("Other", (torch.nn.Linear,), {})),
}


@needs_tags
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen_until_renewed(name):
    model = Model()
    seen = watch(reach_tree(model), tensors_of(model))
    check = seen.check
    assert check()
    assert check()
    CHANGES[name](model)
    assert not check()
    assert seen.renew(tensors_of(model), ())
    assert check()


@needs_tags
def test_in_place_updates_count_for_the_tensors_asked_for():
    model = Model()
    seen = watch(reach_tree(model), tensors_of(model))
    with torch.no_grad():
        model.scale.add_(1)
    assert seen.check()
    seen.renew(tensors_of(model), {id(model.scale)})
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    assert seen.check()
    with torch.no_grad():
        model.scale.add_(1)
    assert not seen.check()


@needs_tags
def test_what_is_replaced_gives_its_memory_back():
    """Not at the next call, but at once: only a tensor's header is kept."""
    model = Model()
    seen = watch(reach_tree(model), tensors_of(model))
    before = weakref.ref(model.scale.untyped_storage())
    model.scale.data = torch.zeros(4)
    gc.collect()
    assert before() is None
    assert not seen.check()


@needs_tags
def test_a_watch_in_the_module_that_it_watches_is_collected():
    model = Model()
    model.seen = watch(reach_tree(model), tensors_of(model))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_nothing_to_watch():
    assert watch(reach_tree(None), [torch.eye(3)]) is None
    assert watch(reach_tree(Model()), [torch.eye(3).to_sparse()]) is None


def _grow(model):
    model.offsets.append(3.0)
    model.layers.append(torch.nn.Linear(4, 4))


UNSEEN = {
    "element of a list": (lambda m: m.offsets.__setitem__(0, 5.0), True),
    "attribute of an object": (lambda m: setattr(m.config, "bias", 7.0), True),
    "longer list": (_grow, True),
    "attribute of the class": (lambda m: setattr(type(m), "shift", 1.5), True),
    "constant": (lambda m: setattr(m, "factor", 3.0), True),
    "attribute that forward does not read": (lambda m: setattr(m, "other", 3.0), False),
    "weights": (lambda m: torch.nn.init.zeros_(m.layers[0].weight), False),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_every_guard_is_checked_at_every_call(name, monkeypatch):
    """Also those that dict versions do not cover: the compiled model never answers with what
    the model was."""
    change, matters = UNSEEN[name]
    monkeypatch.setattr(Model, "shift", 0.5)  # put back afterwards
    model = Model().eval()
    compiled = splitpoint.compile(model, Config(max_size=8))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), model(x))
    change(model)
    if matters:
        with pytest.raises(errors.StateChanged):
            compiled(x)
        compiled.reset()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))


def test_what_holds_a_tensor_is_all_that_leads_to_it():
    model = Model()
    model.twice = model.layers[1]  # met again
    model.layers[0].bias = model.layers[1].bias  # tied
    model.nothing = None
    model.beside = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wanted = [model.layers[0].weight, model.layers[1].weight, model.layers[1].bias]
    facts = {(id(each.holder), each.key, id(each.value)) for each in held(model, wanted)}
    first, second = model.layers
    assert facts == {
        (id(model._modules), "layers", id(model.layers)),
        (id(model.layers._modules), "0", id(first)),
        (id(model.layers._modules), "1", id(second)),
        (id(first._parameters), "weight", id(first.weight)),
        (id(first._parameters), "bias", id(first.bias)),
        (id(second._parameters), "weight", id(second.weight)),
    }
    assert held(model, [torch.ones(1)]) is None
    assert held(None, []) == ()
