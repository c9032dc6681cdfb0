"""What `compile()` returns: a callable that sends each call to the graph of its size's range."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..capture.capture import Capture, capture, described
from ..capture.dims import Lengths, out_of_plan
from ..capture.facts import Roots
from ..capture.regions import capture_for, cover, cover_some
from ..capture.signature import DynamicDims, Signature, changing, more_dims
from ..config import ATTENTION_OPS, Config
from ..errors import (
    CaptureError,
    GraphBreak,
    InputError,
    InvalidDynamicDims,
    OutsideGraph,
    SideEffect,
    SizeMismatch,
    SizeNotServed,
    SizeOutOfPlan,
    TooManySignatures,
    WrongArguments,
    WrongDimension,
    WrongDtype,
    WrongRank,
    WrongStrides,
    WrongValue,
)
from ..graph.names import unmatched
from ..graph.pieces import split
from ..kernels.devices import common_device
from ..ranges import NOT_SERVED, Plan
from ..store import open_store
from .device_fields import device_of, graph_device, notes_on, refuse_on
from .dispatch import Dispatch, stand_in_for
from .entry import write_entry
from .freed_weights import check_whole
from .kernel_choice import refuse_nothing_to_round
from .lanes import Graph
from .parts import Parts
from .plan_lanes import lanes_of, lanes_of_lengths
from .program import Program
from .stats import Stats, stats_of
from .warm_start import start_or

log = logging.getLogger("splitpoint")


@dataclass(frozen=True)
class Dynamic:
    """What is to change from call to call, as `compile` was told."""

    dims: DynamicDims | None
    max_dims: Mapping[str, int]
    size: str | None
    found: DynamicDims | None = None
    """What calls have shown, where nothing was said."""


_OTHER_KIND = (WrongArguments, WrongValue, WrongDtype, WrongRank, WrongStrides)
"""How arguments are of another kind, and not wrong."""

_OTHER_LENGTHS = (WrongDimension, SizeMismatch)
"""How they show that other dimensions change, where it was not said which do."""


_LENGTHS = (SizeMismatch, InvalidDynamicDims)
"""How arguments of one call do not agree with each other."""

_PAST_THE_COMPILED = {"generate", "generate_batch"}
"""Methods of transformers' models that call the model, past what was compiled."""


class CompiledModel:
    """A module or function that sends each call to the graph of its size's range.

    Everything else is that of the module: `state_dict()`, attributes, `.to()` before the
    first call. Tensors updated in place, and parameters replaced by others of the same
    kind, are followed. For inference: gradients are never recorded.

    The first call captures the model with its arguments and compiles the plan. Calls with
    arguments of another kind (a tensor in place of None, another dtype, another value of a
    constant) are captured and compiled too, up to `Config.max_signatures`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: Config,
        dynamic: Dynamic,
    ) -> None:
        own = self.__dict__
        own["module"] = function
        own["config"] = config
        own["_dynamic"] = dynamic
        own["_lock"] = threading.RLock()
        own["_program"] = None
        own["_parts"] = None
        own["_early_eager_calls"] = 0
        own["_call"] = self._other_call
        if not isinstance(function, torch.nn.Module):
            for name in ("__module__", "__name__", "__qualname__", "__doc__"):
                own[name] = getattr(function, name, None)
            own["__wrapped__"] = function  # where inspect.signature looks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at the size of its arguments.

        Raises:
            InputError: one subclass per way in which the arguments do not fit.
            CaptureError, CompileError, GuardError: at the first call (or, with
                `lazy=True`, at the first call of a range).
            StateChanged: when the module is not as it was at capture.
            WeightsFreed: when weights are needed that `free_original_weights` freed.
        """
        try:
            return self._call(*args, **kwargs)
        except TypeError as error:
            if (wrong := self._misfit(error)) is not None:
                raise wrong from None
            raise

    def _misfit(self, error: TypeError) -> WrongArguments | None:
        """What to say of an error of `_call`, caught where that is called, if it was Python that
        could not bind the arguments: then there is no further frame."""
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            return None
        fits = inspect.signature(forward_of(self.module))
        said = str(error).removeprefix("entry() ")  # nobody has heard of that
        return WrongArguments(f"the arguments do not fit {fits}: {said}")

    # --- what the user reads -----------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan: as configured before the first call, as compiled after it."""
        found: Plan = self._program.plan if self._program else self.config.plan()
        if self._parts is not None:
            found = replace(found, notes=(*found.notes, *self._parts.notes()))
        return found

    def stats(self) -> Stats:
        """Counters since creation or the last `reset()`."""
        eager_calls = self._early_eager_calls + (self._parts.eager_calls if self._parts else 0)
        return stats_of(self._programs(), eager_calls)

    def _programs(self) -> list[Program]:
        own = [self._program] if self._program else []
        return own if self._parts is None else [*own, *(p.program for p in self._parts.parts)]

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is compiled in the background any more (`Config.background`); False
        when that takes longer.

        Raises:
            BackgroundError: when some of it failed, each time.
        """
        program = self._program
        return program is None or program.wait(timeout_s)

    def repack(self) -> None:
        """Bring all packed and rounded copies of weights up to date, after updates that torch does
        not count: of `weight.data` (`weight.data += delta`, as some libraries merge adapters), of a
        NumPy array that shares a weight's memory, of weights made in `torch.inference_mode()`."""
        for program in self._programs():
            program.binding.repack(whole=True)

    def close(self) -> None:
        """Compile nothing more in the background, and wait until the piece that is compiled now
        is done. Calls go on being served by what is there. A program that ends does the same."""
        if self._program is not None:
            self._program.background.close()

    def reset(self) -> None:
        """Forget what was captured and compiled; the next call starts anew."""
        self.close()
        with self._lock:
            self.__dict__.update(
                _program=None, _parts=None, _early_eager_calls=0, _call=self._other_call
            )

    def __repr__(self) -> str:
        name = getattr(self.module, "__qualname__", type(self.module).__name__)
        state = "compiled" if self._program else "not called yet"
        return f"<splitpoint.CompiledModel of {name}, {state}, {len(self.plan.ranges)} ranges>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as what it was made from: what was compiled comes back through the
        store, or is compiled anew.

        Raises:
            WeightsFreed: when weights of the module were freed.
        """
        check_whole(_roots(self.module).owner)
        return type(self), (self.module, self.config, self._dynamic)

    # --- the module --------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["module"], name)
        if getattr(value, "__self__", None) is not self.module or not callable(value):
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            if name in _PAST_THE_COMPILED:
                raise CaptureError(
                    f"{name}() of a compiled model would call the model itself, uncompiled: call "
                    f"splitpoint.integrations.transformers.compile(model), and then "
                    f"model.{name}(...)"
                )
            result = value(*args, **kwargs)
            return self if result is self.module else result  # .to(), .eval(), ...

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.module)})

    # --- the first call of a kind -------------------------------------------------------

    def _other_call(self, *args: Any, **kwargs: Any) -> Any:
        """A call whose arguments are not seen to be of a kind that was captured."""
        is_new = False
        with self._lock:
            program: Program | None = self._program
            before = self._dynamic
            try:
                found = self._kind_of(program.dispatches if program else [], args, kwargs)
                if not isinstance(found, tuple):
                    signature = self._signature(args, kwargs)
                    if 0 in signature.lengths:  # nothing to capture from, and nothing to gain
                        self.__dict__["_dynamic"] = before
                        self.__dict__["_early_eager_calls"] += 1
                        return self.module(*args, **kwargs)
                    dims, lengths = signature.dims, signature.lengths
                    if said := out_of_plan(dims, lengths, self.config.max_size):
                        if isinstance(found, WrongDimension) and self._dynamic is not before:
                            said = f"{found}\nwhere it may change as well: {said}"
                        self.__dict__["_dynamic"] = before
                        return self._out_of_plan(said, args, kwargs)
                    if self._parts is not None:
                        return self._parts.first_call(signature, args, kwargs)
                    try:
                        found, is_new = (self._start(signature), lengths), True
                    except (GraphBreak, SideEffect, OutsideGraph) as error:
                        if self.config.on_break == "error":
                            raise
                        return self._cut(error, signature, args, kwargs)
                    except CaptureError as error:
                        # How a tensor differs says more than where tracing stopped; why the model
                        # does not take another value, it says itself.
                        if isinstance(found, InputError) and not isinstance(found, WrongValue):
                            raise found from error
                        raise
                    if self._dynamic is not before:
                        log.warning(
                            "other dimensions change too, so the model was captured and compiled "
                            "anew, which dynamic_dims=%s saves from the start",
                            self._dynamic.found,
                        )
            except BaseException:  # what a refused call showed is not to change later ones
                self.__dict__["_dynamic"] = before
                raise
            dispatch, lengths = found
            program = self._program
        assert program is not None
        try:
            return self._run(program, dispatch, lengths, args, kwargs)
        except Exception:
            if is_new:
                self._forget(program, dispatch, before)
            raise

    def _run(
        self,
        program: Program,
        dispatch: Dispatch,
        lengths: Lengths,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        index = program.index_at(dispatch, lengths)
        if index == NOT_SERVED:
            return self._not_served(dispatch, lengths, args, kwargs)
        program.calls[index] += 1
        tensors = dispatch.arguments.tensors_in(dispatch.arguments.bind(args, kwargs))
        with torch.no_grad():
            return program.runners[index](*lengths, *tensors)

    def _forget(self, program: Program, dispatch: Dispatch, before: Dynamic) -> None:
        """Take back a kind whose first call failed: it would count among `max_signatures`. The
        first kind stays, as there is nothing to go back to: weights may be freed, and what is
        compiled says why it failed. So does what the background still compiles."""
        with self._lock:
            known = program.dispatches
            if self._program is program and dispatch in known[1:] and not self.config.background:
                program.drop(dispatch)
                entry = write_entry(program, self._not_served, self._other_call)
                self.__dict__.update(_dynamic=before, _call=entry)

    def _cut(
        self, why: CaptureError, signature: Signature, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Have what cannot be captured served in parts, all of it where nothing was captured."""
        self.__dict__["_parts"] = parts = Parts(self.module, self.config, signature, why)
        result = parts.first_call(signature, args, kwargs)
        if self._program is None:
            self.__dict__["_call"] = parts
        return result

    def _kind_of(
        self, known: Sequence[Dispatch], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Dispatch, Lengths] | InputError | None:
        """What serves a call, and its lengths; where it is to be captured, how it differs from the
        first kind that was, if any.

        Raises:
            InputError: when it can be neither.
        """
        if not known:
            return None
        arguments = known[0].arguments.bind(args, kwargs)
        refused: list[InputError] = []
        for dispatch in known:
            try:
                return dispatch, dispatch.arguments.explain(arguments)
            except InputError as error:
                refused.append(error)
        wrong = [error for error in refused if not isinstance(error, _OTHER_KIND)]
        first = (wrong or refused)[0]
        most = 1 if self.config.free_original_weights else self.config.max_signatures
        if most > 1 and self._dynamic.dims is None and isinstance(first, _OTHER_LENGTHS):
            changed = more_dims(known[refused.index(first)].arguments, arguments)
            self.__dict__["_dynamic"] = replace(self._dynamic, found=changed)
        elif wrong or most == 1:
            raise first
        try:
            signature = self._signature(args, kwargs)
        except InputError as error:
            raise (error if isinstance(error, _LENGTHS) else first) from None
        if len(known) >= most:
            changes, advice = changing([*(each.arguments for each in known), signature])
            raise TooManySignatures(
                f"the model was captured for {len(known)} kinds of arguments already, and "
                f"{changes}: {advice or 'pass what changes as a tensor, or raise max_signatures'}"
            )
        return first

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        dynamic: Dynamic = self._dynamic
        dims = dynamic.found if dynamic.dims is None else dynamic.dims
        given = dims, dynamic.max_dims, dynamic.size, self.config.max_size
        return Signature(forward_of(self.module), args, kwargs, *given)

    def _start(self, signature: Signature) -> Dispatch:
        program = self._program or Program(self.config, open_store(self.config))
        roots = _roots(self.module)
        check_whole(roots.owner)
        refuse_on(
            self.config, common_device((leaf.path, leaf.device) for leaf in signature.tensors)
        )
        dispatch = start_or(program, signature, roots, lambda: self._compile(program, signature))
        if dispatch.capture_at is None and not signature.dims.is_size_alone:  # from the store
            dispatch.capture_at = self._captures_at(dispatch, signature, [])
        program.binding.free_originals()
        entry = write_entry(program, self._not_served, self._other_call)
        self.__dict__.update(_program=program, _call=entry)
        return dispatch

    def _compile(self, program: Program, signature: Signature) -> Dispatch:
        config, dims = self.config, signature.dims
        if config.background and not dims.is_size_alone:
            raise InvalidDynamicDims(
                f"background=True is for one dynamic dimension, got {', '.join(dims.names)}: "
                f"leave it out, or compile ranges when they are called with lazy=True"
            )
        if config.compile_shapes and dims.is_size_alone:
            raise InvalidDynamicDims(
                f"compile_sizes has {config.compile_shapes[0]}, but one dimension changes: write "
                f"sizes"
            )
        device = device_of(self.module, signature)
        capture_at = functools.partial(capture, self.module, signature)
        if dims.is_size_alone:
            regions = cover(capture_at, signature.size, config.max_size)
        else:
            regions = cover_some(capture_at, dims, signature.lengths, config.max_size)
        asked = [name for name in config.splitting_ops if name not in ATTENTION_OPS]
        for name in set.intersection(
            *(set(unmatched(each.graph_module.graph, asked)) for each in regions.captures)
        ):
            log.warning("splitting_ops names %s, which the model does not call", name)
        graphs = [_graph(captured, signature, config) for captured in regions.captures]
        refuse_nothing_to_round(config, graphs)
        if dims.is_size_alone:
            lanes = lanes_of(config, regions.owner, graphs, regions.boundaries)
        else:
            lanes = lanes_of_lengths(config, dims, graphs, signature.lengths)
        ranges = [lane.planned.range for lane in lanes]
        notes = notes_on(config, device, ranges) + [f"refused: {r}" for r in regions.refusals]
        stand_in = stand_in_for(self.module, signature)
        dispatch = program.add(lanes, notes, signature, regions, stand_in)
        dispatch.capture_at = self._captures_at(dispatch, signature, list(regions.captures))
        if not config.lazy:
            try:
                program.compile_all()
            except BaseException:
                program.drop(dispatch)
                raise
        return dispatch

    def _captures_at(
        self, dispatch: Dispatch, signature: Signature, captures: list[Capture]
    ) -> Callable[[Lengths], Graph]:
        """`Dispatch.capture_at`, beside what was captured already."""

        def graph_at(lengths: Lengths) -> Graph:
            at = functools.partial(capture, self.module, signature)
            captures.append(capture_for(at, captures, lengths))
            regions = dispatch.regions
            assert regions is not None
            dispatch.regions = replace(regions, captures=(*regions.captures, captures[-1]))
            return _graph(captures[-1], signature, self.config)

        return graph_at

    # --- sizes without a lane ----------------------------------------------------------

    def _not_served(
        self, dispatch: Dispatch, lengths: Lengths, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if 0 in lengths:
            self._program.counts.eager_calls += 1
            return self.module(*args, **kwargs)
        if said := out_of_plan(dispatch.dims, lengths, self.config.max_size):
            return self._out_of_plan(said, args, kwargs)
        assert dispatch.regions is not None
        raise SizeNotServed(
            f"{described(dispatch.dims.names, lengths)} is refused by the model itself: "
            f"{'; '.join(dispatch.regions.refusals)}"
        )

    def _out_of_plan(self, said: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.config.on_out_of_plan == "eager":
            if self._program is None:
                self.__dict__["_early_eager_calls"] += 1
            else:
                self._program.counts.eager_calls += 1
            return self.module(*args, **kwargs)
        raise SizeOutOfPlan(f"{said}, split the batch, or set on_out_of_plan='eager'")


def _roots(function: Callable[..., Any]) -> Roots:
    """Where what a capture reads is looked up."""
    owner = function if isinstance(function, torch.nn.Module) else None
    if owner is None:
        bound_to = getattr(function, "__self__", None)
        owner = bound_to if isinstance(bound_to, torch.nn.Module) else None
    return Roots(owner, forward_of(function))


def _graph(captured: Capture, signature: Signature, config: Config) -> Graph:
    dims = signature.dims
    return Graph(
        split(captured.graph_module, config.splitting_ops, captured.symbols, dims, captured.bound),
        captured.inputs,
        len(signature.tensors),
        (captured.result_leaves, captured.result_spec),
        captured.state,
        conditions=() if dims.is_size_alone else captured.assumptions,
        argument_names=[leaf.path for leaf in signature.tensors],
        device=graph_device(signature, captured.state.bound),
    )


def forward_of(module: Callable[..., Any]) -> Callable[..., Any]:
    """What a call of a module or function runs, whose signature its arguments fit."""
    return module.forward if isinstance(module, torch.nn.Module) else module
