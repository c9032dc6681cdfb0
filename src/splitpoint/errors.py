"""Every error a user of Splitpoint can meet: one class per failure.

All derive from `SplitpointError`. The message of each names what was given, what was
expected and what to do about it. The classes also derive from the built-in class that a
caller would expect (`ValueError`, `TypeError`, ...), so that existing handlers work.
"""

from __future__ import annotations

from torch import distributed


class SplitpointError(Exception):
    """Base of every error raised on purpose by this package."""


class UnsupportedTorch(SplitpointError, ImportError):
    """This version of torch lacks a private name that is needed and has no other way."""


# --- configuration ---------------------------------------------------------------------


class ConfigError(SplitpointError, ValueError):
    """A `Config` (or `Range`) field holds something that cannot be used."""


class UnknownField(ConfigError):
    """A field name that `Config` does not have."""


class UnsupportedField(ConfigError):
    """A field of another program's configuration asks for something that is not here."""


class ConflictingFields(ConfigError):
    """Two names of one field were given different values."""


class InvalidField(ConfigError):
    """A field holds a value of the wrong type or outside its choices."""


class InvalidMaxSize(ConfigError):
    """`max_size` is not an integer from 1 to 2**20."""


class NonIntegerPoint(ConfigError):
    """A split point or compile size is not an integer."""


class NonPositivePoint(ConfigError):
    """A split point or compile size is zero or negative."""


class PointAboveMax(ConfigError):
    """A split point or compile size lies above `max_size`."""


class UnsortedPoints(ConfigError):
    """Split points or compile sizes are not in ascending order."""


class DuplicatePoint(ConfigError):
    """A split point or compile size is given twice."""


class InvalidRange(ConfigError):
    """A `Range` that is empty or does not start at 1 or above."""


class InvalidJSON(ConfigError):
    """Text that is not the JSON of a `Config` or a `Plan`."""


class NotSerializable(ConfigError):
    """A pass in `Config.passes` that cannot be written as JSON."""


class UnknownInductorOption(ConfigError):
    """`inductor_options` names an option this torch's Inductor does not have."""


class UnsupportedOnDevice(ConfigError):
    """A field of `Config` asks for something that the model's device does not have."""


# --- the arguments of a call -----------------------------------------------------------


class InputError(SplitpointError, ValueError):
    """A call's arguments do not fit what the model was captured with."""


class WrongArguments(InputError, TypeError):
    """Arguments are missing, unknown, or nested differently than at capture."""


class TooManySignatures(InputError):
    """Calls came with more kinds of arguments than `Config.max_signatures`."""


class WrongValue(InputError):
    """A non-tensor argument differs from the value it had at capture."""


class WrongDtype(InputError, TypeError):
    """A tensor argument has another dtype than at capture."""


class WrongDevice(InputError):
    """A tensor argument is on another device than at capture."""


class MixedDevices(InputError):
    """The arguments of a call, and what the model reads, are on several devices."""


class WrongRank(InputError):
    """A tensor argument has another number of dimensions than at capture."""


class WrongDimension(InputError):
    """A static dimension of a tensor argument differs from capture."""


class WrongStrides(InputError):
    """A tensor argument is laid out in memory differently than at capture."""


class SizeMismatch(InputError):
    """Two arguments that share the size have different sizes."""


class SizeOutOfPlan(InputError):
    """The size of a call lies outside [1, max_size]."""


class SizeNotServed(InputError):
    """The model itself refuses this size, as eager PyTorch would."""


class GradientRequired(InputError):
    """An argument requires gradients: compiled models are for inference."""


class OverlappingMemory(InputError):
    """An argument overlaps in memory with another tensor, and the model updates one of them."""


class InvalidDynamicDims(InputError):
    """`dynamic_dims` names an argument or dimension that does not exist, or finds no size."""


# --- capture, compilation and what they assumed ----------------------------------------


class CaptureError(SplitpointError, RuntimeError):
    """The model could not be captured as one graph."""

    details: str = ""
    """What torch said, in full."""


class GraphBreak(CaptureError):
    """The model does what no graph can hold: it branches on data, prints, reads a file."""


class CutFailed(CaptureError):
    """torch.compile, which cuts a model that no one graph can hold, failed by itself."""


class SideEffect(CaptureError):
    """The model changes Python state in its forward, which a graph cannot repeat."""


class SizeSpecialized(CaptureError):
    """The model's graph depends on the size in too many ways to serve the plan."""


class UnsupportedGraph(CaptureError):
    """The captured graph holds something that cannot be split into pieces."""


class OutsideGraph(UnsupportedGraph):
    """The model does with what it computed what no graph can hold: it takes sizes from data, or
    returns objects of a class that torch cannot take apart."""


class UnknownSplittingOp(CaptureError):
    """`splitting_ops` names an operator that is not registered."""


class GuardError(SplitpointError, RuntimeError):
    """A graph is only valid for a part of its range, and `on_guard` forbids splitting."""


class StateChanged(SplitpointError, RuntimeError):
    """The module or a global it reads changed since capture."""


class WeightsFreed(SplitpointError, RuntimeError):
    """A weight is needed whose memory was freed (`Config.free_original_weights`)."""


class WeightsInUse(SplitpointError, RuntimeError):
    """A weight cannot be freed, because another compiled model reads it without looking."""


class CompileError(SplitpointError, RuntimeError):
    """The compiler failed on a piece."""


class BackgroundError(CompileError):
    """Compiling in the background failed; the cause says how."""


class PassError(CompileError):
    """A pass raised, returned something unexpected, or left a broken graph."""


class NothingToRound(CompileError):
    """`Config.activations` asks for what no linear layer of the model can have."""


class NotBatchInvariant(CompileError):
    """A row's result may have other bits beside other rows, and `batch_invariant` forbids it."""


class NotCompiling(SplitpointError, RuntimeError):
    """`current_range()` was called outside a pass."""


class KernelBuildError(SplitpointError, RuntimeError):
    """The package's own C++ kernels could not be built or loaded on this machine."""


# --- collectives -----------------------------------------------------------------------


class InvalidPolicy(ConfigError):
    """A collective policy, or a table to build one from, that cannot be used."""


class RanksDisagree(SplitpointError, RuntimeError):
    """The ranks of a group would decide differently, which would leave some of them waiting."""


class RankFailed(SplitpointError, RuntimeError):
    """One of the processes that serve as ranks raised an error or died."""


class InvalidCollective(SplitpointError, ValueError):
    """An argument of a collective operator has no meaning for it."""


class CollectiveFailed(SplitpointError, distributed.DistBackendError):
    """A collective cannot be finished: a rank died, stalled, or made another call. The message
    names the group, the rank and the call. Also a `torch.distributed.DistBackendError`."""


class WorkspaceError(SplitpointError, RuntimeError):
    """A shared-memory workspace could not be attached to a process group."""


# --- the command line ------------------------------------------------------------------


class UsageError(SplitpointError):
    """The command line was asked for something it cannot do."""


class ModelNotFound(UsageError):
    """MODEL is neither a known name, nor a folder, nor a model that can be fetched."""


class ServerFailed(SplitpointError, RuntimeError):
    """A server that a benchmark started ended, stalled, or did not answer as it was asked to."""


class OutputMismatch(SplitpointError, RuntimeError):
    """A compiled model's output differs from eager's by more than rounding explains."""


class LoadFailed(SplitpointError):
    """A process that was to load the machine ended by itself."""


class BaselineFailed(SplitpointError, RuntimeError):
    """Something that splitpoint is compared with could not run the model."""


# --- the store -------------------------------------------------------------------------


class StoreError(SplitpointError):
    """A store cannot do what was asked of it."""


class UntrustedStore(StoreError, PermissionError):
    """A folder that code is run from, or one on the way to it, is open to somebody else."""


# --- other programs --------------------------------------------------------------------


class UnsupportedVllm(SplitpointError, ImportError):
    """A name of vLLM that is read or replaced is missing, or takes other arguments."""


class SharedCores(SplitpointError, RuntimeError):
    """Threads are bound to fewer cores than there are of them."""


# --- caches and integrations -----------------------------------------------------------


class CacheFull(SplitpointError, MemoryError):
    """The cache of keys and values has no room for what a call wants to add."""


class UnsupportedModel(SplitpointError, NotImplementedError):
    """A model, or a way of calling it, that an integration cannot serve."""
