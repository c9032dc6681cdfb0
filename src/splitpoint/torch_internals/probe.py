"""Compare the table of private names with the torch that is installed: once, when first asked."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
import types
from typing import Any

import torch

from ..errors import UnsupportedTorch
from .names import CHECKED, USES, Use

log = logging.getLogger("splitpoint")

_NAME = re.compile(
    r"(?P<module>[\w.]+):(?P<path>[\w.]+)(?:@(?P<instance>\w+))?(?:\((?P<call>.*)\))?"
)

_BY_KEY = {use.key: use for use in USES}


def require(key: str) -> None:
    """Make sure that all names of a use are there, shaped as expected.

    Raises:
        UnsupportedTorch: naming the first that is not.
    """
    if (misfit := _misfit(key)) is not None:
        use = _BY_KEY[key]
        raise UnsupportedTorch(
            f"torch {torch.__version__} {misfit}, which is needed to {use.purpose}.\n"
            f"Splitpoint runs on torch {CHECKED[0]} to {CHECKED[-1]}: install one of these, or a "
            f"newer Splitpoint"
        )


def fits(key: str) -> bool:
    """Whether all names of a use are there, shaped as expected; where they are not, the log says
    once what is done without it."""
    return _misfit(key) is None


@functools.cache
def _misfit(key: str) -> str | None:
    """What of a use does not fit this torch, "has no ..."; None when all does."""
    use = _BY_KEY[key]
    found = next(filter(None, map(misfit, use.entries)), None)
    if found is not None and use.kind != "needed" and not _does_it_itself(use):
        level = logging.WARNING if use.kind == "safety" else logging.INFO
        log.log(level, "torch %s %s: %s", torch.__version__, found, use.without)
    return found


def _does_it_itself(use: Use) -> bool:
    return bool(use.until) and _version(torch.__version__) >= _version(use.until)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:2])


def misfit(name: str) -> str | None:
    """Why an entry of the table does not fit this torch; None when it does."""
    parts = _NAME.fullmatch(name)
    assert parts is not None, name
    path = f"{parts['module']}.{parts['path']}"
    try:
        found = _look_up(parts["module"], parts["path"])
    except (ImportError, AttributeError):
        return f"has no {path}"
    if (attribute := parts["instance"]) is not None:
        return None if _instances_have(found, attribute) else f"has no {path}.{attribute}"
    if (call := parts["call"]) is not None and not _takes(found, call):
        return f"has a {path} that takes other arguments"
    return None


def _look_up(module: str, path: str) -> Any:
    owner: Any
    if module.startswith(("torch.ops.", "torch._C.")):  # their modules are no files
        owner = functools.reduce(getattr, module.split(".")[1:], torch)
    else:
        owner = importlib.import_module(module)
    return functools.reduce(getattr, path.split("."), owner)


def _instances_have(kind: Any, attribute: str) -> bool:
    """Whether a class has an attribute or names it in its own code, as it does where it sets it."""
    if hasattr(kind, attribute):
        return True
    for base in getattr(kind, "__mro__", ()):
        if attribute in vars(base).get("__annotations__", {}):
            return True
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if isinstance(code, types.CodeType) and attribute in code.co_names:
                return True
    return False


def _takes(function: Any, call: str) -> bool:
    """Whether arguments can be given as `call` says; yes where Python cannot tell (C++)."""
    count, *keywords = (part.strip() for part in call.split(","))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return callable(function)
    try:
        signature.bind(*range(int(count)), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def state_of(use: Use) -> str:
    """ "active", "torch's own" where this version does by itself what a use is for, or what of it
    does not fit."""
    found = _misfit(use.key)
    if found is None:
        return "active"
    return "torch's own" if _does_it_itself(use) else found
