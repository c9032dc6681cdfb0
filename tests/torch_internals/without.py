"""Runs models with the names of one use of the table taken away, each use in a process of its own.

`python -m tests.torch_internals.without FOLDER WAY` prints JSON: by use, what came of each step,
"right" or an error. Names are taken away from Splitpoint alone: for its code they are not there
(WAY "renamed") or take other arguments ("changed"), while torch itself goes on using them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch


def asked_by_splitpoint() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("splitpoint.")


def changed(*, something_else: int) -> None:
    """What a function that takes other arguments looks like."""


class View(types.ModuleType):
    """A module without some names for Splitpoint's code; all else goes to the module itself."""

    def __init__(self, name: str) -> None:
        """Nothing: what modules have is the other's."""

    def __getattribute__(self, name: str) -> Any:
        real, hidden = VIEWS[id(self)]
        if name in hidden and asked_by_splitpoint():
            if hidden[name] is None:
                raise AttributeError(name)
            return hidden[name]
        return getattr(real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(VIEWS[id(self)][0], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(VIEWS[id(self)][0], name)


VIEWS: dict[int, tuple[Any, dict[str, Any]]] = {}
"""By id of a view: the module itself, and what stands in for the names that are taken away."""


class Member:
    """The same for an attribute of a class or of its instances."""

    def __init__(self, kind: type, name: str, instead: Any) -> None:
        self.name, self.instead = name, instead
        self.real = inspect.getattr_static(kind, name, self)

    def __get__(self, instance: Any, owner: type) -> Any:
        if asked_by_splitpoint():
            if self.instead is None:
                raise AttributeError(self.name)
            return self.instead
        if instance is not None and self.name in getattr(instance, "__dict__", ()):
            return vars(instance)[self.name]
        if self.real is self:
            raise AttributeError(self.name)
        getter = getattr(type(self.real), "__get__", None)
        return self.real if getter is None else getter(self.real, instance, owner)


class InstanceMember(Member):
    """One that instances set, so that it comes before what is in their dict."""

    def __set__(self, instance: Any, value: Any) -> None:
        setter = getattr(type(self.real), "__set__", None)
        if setter is not None and self.real is not self:
            setter(self.real, instance, value)
        else:
            vars(instance)[self.name] = value


def take_away(entry: str, way: str) -> None:
    """Take away one entry of the table; nothing where this version of torch has no such name."""
    module, path, attribute, call = parts(entry)
    try:
        look_up(module, path.split(".")[0])
    except AttributeError:
        return
    instead = changed if way == "changed" and call is not None else None
    first, *rest = path.split(".")
    owner = look_up(module, first)
    if attribute is not None:
        setattr(owner, attribute, InstanceMember(owner, attribute, None))
        GONE.add((owner, attribute))
    elif rest and isinstance(owner, type) and rest[0] not in getattr(owner, "__members__", ()):
        setattr(owner, rest[0], Member(owner, rest[0], instead))
    else:
        names_hidden_of(module)[first] = instead


GONE: set[tuple[Any, str]] = set()
"""(class, attribute) of what instances no longer have."""


def parts(entry: str) -> tuple[str, str, str | None, str | None]:
    """Of an entry: module, qualified name, attribute of instances, how it is called."""
    found = re.fullmatch(r"([\w.]+):([\w.]+)(?:@(\w+))?(?:\((.*)\))?", entry)
    assert found is not None
    return found[1], found[2], found[3], found[4]


def look_up(module: str, name: str) -> Any:
    if module in sys.modules:
        return getattr(sys.modules[module], name)
    return getattr(functools.reduce(getattr, module.split(".")[1:], torch), name)


def names_hidden_of(module: str) -> dict[str, Any]:
    """What stands in for names of a module, which a view takes the place of."""
    parent, _, last = module.rpartition(".")
    owner = functools.reduce(getattr, parent.split(".")[1:], torch)
    real = sys.modules.get(module) or getattr(owner, last)
    if type(real) is not View:
        view = View(module)
        VIEWS[id(view)] = real, {}
        if module in sys.modules:
            sys.modules[module] = view
        setattr(owner, last, view)
        real = view
    return VIEWS[id(real)][1]


# --- what is run ------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x))) * self.scale


def in_ranges(folder: str) -> None:
    """A compiled model, and the same from the store where there is one: right at every size, also
    after its weights were exchanged, and not wrong when something else was."""
    from splitpoint import Config, compile
    from splitpoint.errors import StateChanged

    torch.manual_seed(0)
    for _ in range(2):
        block = Block().eval().requires_grad_(False)
        compiled = compile(block, Config(max_size=64, split_points=[8], cache_dir=folder))
        for size in (1, 5, 8, 9, 64, 0):
            x = torch.randn(size, 16)
            torch.testing.assert_close(compiled(x), block(x))
        x = torch.randn(5, 16)
        block.up.weight = torch.nn.Parameter(torch.randn(32, 16), requires_grad=False)
        torch.testing.assert_close(compiled(x), block(x))
        block.down.bias.add_(1)
        torch.testing.assert_close(compiled(x), block(x))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), block(x))
        block.scale = 2.0
        try:
            found = compiled(x)
        except StateChanged:
            continue
        torch.testing.assert_close(found, block(x))


def as_backend() -> None:
    """The same as a backend of torch.compile."""
    block = Block().eval().requires_grad_(False)
    options = {"max_size": 64, "split_points": [8], "cache_dir": ""}
    compiled = torch.compile(block, backend="splitpoint", options=options)
    x = torch.randn(9, 16)
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(compiled(x), block(x))


def by_group(folder: str) -> None:
    """A collective of one rank."""
    from splitpoint.torch_internals import distributed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}.group", rank=0, world_size=1
    )
    name = distributed.group_name(torch.distributed.group.WORLD)
    assert distributed.group_sizes()[name] == 1
    x = torch.randn(4)
    torch.testing.assert_close(distributed.all_reduce(x, name), x)


def measured() -> None:
    """What the benchmarks lean on."""
    from splitpoint.torch_internals import baselines
    from splitpoint.torch_internals.onednn import prepacked_linear

    with baselines.max_autotune():
        pass
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    if (linear := prepacked_linear(weight)) is not None:
        torch.testing.assert_close(linear(x), x @ weight.T)


def steps(folder: str) -> dict[str, Callable[[], None]]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return {
        "ranges": lambda: in_ranges(folder),
        "backend": as_backend,
        "group": lambda: by_group(folder),
        "measured": measured,
    }


def outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except BaseException as error:  # noqa: BLE001  it is told what it is
        # Dynamo wraps what a backend raises.
        inner = getattr(error, "inner_exception", None) or error.__cause__ or error
        kind = type(error if type(error).__name__ == "UnsupportedTorch" else inner).__name__
        return kind if kind == "UnsupportedTorch" else f"{kind}: {error}"
    return "right"


def without(entries: list[str], way: str, folder: str) -> dict[str, str]:
    """What comes of each step without some entries of the table, in a process that has imported
    all of torch that Splitpoint uses, but not Splitpoint."""
    for entry in entries:
        take_away(entry, way)
    # An attribute of instances shows in the code of its class, which stays as it is.
    package = types.ModuleType("splitpoint")
    package.__path__ = [str(SOURCE)]
    sys.modules["splitpoint"] = package
    probe = importlib.import_module("splitpoint.torch_internals.probe")
    shown = probe._instances_have
    probe._instances_have = lambda kind, name: (kind, name) not in GONE and shown(kind, name)
    del sys.modules["splitpoint"]
    return {name: outcome(step) for name, step in steps(folder).items()}


SOURCE = pathlib.Path(__file__).parents[2] / "src" / "splitpoint"


def table() -> Any:
    """The table, read without importing the package."""
    path = SOURCE / "torch_internals" / "names.py"
    spec = importlib.util.spec_from_file_location("table_of_names", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.USES


def in_a_fork(entries: list[str], way: str, folder: str) -> dict[str, str]:
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        found = without(entries, way, f"{folder}/{os.getpid()}")
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return dict(json.loads(text)) if text else {"ranges": "the process died"}


def main(folder: str, way: str) -> None:
    uses = table()
    for use in uses:
        for entry in use.entries:
            module = parts(entry)[0]
            if not module.startswith(("torch.ops.", "torch._C.")):
                importlib.import_module(module)
    found = {"": in_a_fork([], way, folder)}
    for use in uses:
        found[use.key] = in_a_fork(list(use.entries), way, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
