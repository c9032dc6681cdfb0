"""A compiled `nn.Module`, which is one itself."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import Config
from .compiled_model import CompiledModel, Dynamic

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where `nn.Module` keeps what runs around a call."""


class CompiledModule(CompiledModel, nn.Module):
    """A compiled module: as a child of another module it is found, moved, saved and copied.

    Its parameters, buffers and children are those of the module it was compiled from, under
    their own names. Hooks registered here run around each call; those that the module had are part
    of what is captured.
    """

    def __init__(self, module: nn.Module, config: Config, dynamic: Dynamic) -> None:
        super().__init__(module, config, dynamic)
        # nn.Module.__init__ does not run: what else it would set is looked up in the module.
        self.__dict__.update({name: OrderedDict() for name in HOOKS}, _hooked=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `CompiledModel.__call__`."""
        if self._hooked:
            return nn.Module.__call__(self, *args, **kwargs)
        try:  # again, since a call of the other would take as long as the rest
            return self._call(*args, **kwargs)
        except TypeError as error:
            if (wrong := self._misfit(error)) is not None:
                raise wrong from None
            raise

    @property  # made when asked for: kept, it would be a cycle
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """A call without hooks, with the signature of the module's `forward`."""
        call = functools.partial(CompiledModel.__call__, self)
        return functools.wraps(self.module.forward)(call)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.register_forward_pre_hook`; the hook runs before each call."""
        self.__dict__["_hooked"] = True
        return nn.Module.register_forward_pre_hook(self, *args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.register_forward_hook`; the hook runs after each call."""
        self.__dict__["_hooked"] = True
        return nn.Module.register_forward_hook(self, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """As `CompiledModel.__reduce__`, with the hooks."""
        return *super().__reduce__(), {name: self.__dict__[name] for name in (*HOOKS, "_hooked")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def _of_the_module(name: str) -> Callable[..., Any]:
    """A method that is the module's own, overridden or not."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result  # .to(), .eval(), ...

    return method


_AS_INHERITED = {"named_modules", "modules", "_wrapped_call_impl", "_call_impl", "_slow_forward"}
"""Methods of `nn.Module` that are about this object itself, not about what it holds."""

for _name, _value in vars(nn.Module).items():
    if not callable(_value) or _name.startswith("__") or _name in _AS_INHERITED:
        continue
    if _name not in vars(CompiledModule):
        setattr(CompiledModule, _name, _of_the_module(_name))
