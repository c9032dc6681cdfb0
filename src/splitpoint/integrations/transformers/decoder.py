"""The forward of a causal language model, over compiled parts and the paged cache."""

from __future__ import annotations

import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ... import api
from ...config import Activations, Config, Weights
from ...errors import CaptureError, UnsupportedModel
from ...ranges import align
from ...runtime.paged_cache import BLOCK_TOKENS, CACHED_ATTENTION, PagedCache
from .attention import NAME, register
from .continuous import Places, is_step
from .copies import Body, Given, Head, install_hooks, with_config
from .layer import PagedLayer
from .rope import rope_limit
from .rounding import HEAD, rounding

log = logging.getLogger("splitpoint")

KEYS_AND_VALUES = (
    "cache"
    if any(each.name == "cache" for each in dataclasses.fields(CausalLMOutputWithPast))
    else "past_key_values"
)
"""What this version of transformers calls the cache of a forward and of its result: since 5.24 what
continuous batching calls its own too."""

_UNDERSTOOD = ("cache_position", "return_dict", "output_attentions", "output_hidden_states")
"""Further arguments of a forward; the last two where they are off."""


class Decoder:
    """What `compile` puts in the place of a model's forward.

    The body of the model sees the tokens of a step in one row, [1, tokens], whatever the batch, so
    that its size is the tokens of the step. How much each sequence holds is data: no graph depends
    on it. The head is compiled apart, for the rows whose logits are asked for.
    """

    def __init__(
        self, model: Any, config: Config, *, max_cache_tokens: int, max_sequences: int
    ) -> None:
        register()
        self.model = model
        self.stock: Callable[..., Any] = model.forward
        """The model's own."""
        text = model.config.get_text_config(decoder=True)
        configs = {id(each): _other(each) for each in (model.config, text)}
        inner = getattr(model, model.base_model_prefix, None)
        if not isinstance(inner, nn.Module) or inner is model:
            raise UnsupportedModel(
                f"{type(model).__name__} has no body apart from its head: compile it with "
                f"splitpoint.compile"
            )
        install_hooks(inner)
        self.body: Any = api.compile(
            Body(with_config(inner, configs)),
            replace(config, splitting_ops=(*config.splitting_ops, CACHED_ATTENTION)),
            dynamic_dims={"input_ids": 1, "position_ids": 1},
        )
        head = with_config(model, configs)
        head._modules[model.base_model_prefix] = Given()
        of_head = replace(config, weights=HEAD) if config.weights else config
        self.head: Any = api.compile(Head(head), of_head, dynamic_dims={"hidden": 0})
        self.weights, self.activations = config.weights, config.activations
        self.max_size = config.max_size
        self.rope = rope_limit(text)
        heads = text.num_attention_heads
        self.cache = PagedCache(
            text.num_hidden_layers,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            model.dtype,
            max_cache_tokens,
            max_sequences,
        )
        self._said: set[str] = set()
        self._checked = False
        self._places: weakref.WeakKeyDictionary[Any, Places] = weakref.WeakKeyDictionary()
        """By transformers' cache of continuous batching."""

    # --- what stands in model.forward --------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the model's own: logits, and the cache that `past_key_values` (`cache`) is then.

        Calls that need more than logits run the model itself, and the log says so once.

        Raises:
            CacheFull: when the tokens do not fit into the cache; nothing has changed then.
            UnsupportedModel: when a cache that this filled comes with what only the model
                itself can do.
        """
        continuous = is_step(kwargs)
        if past_key_values is None and not continuous:
            past_key_values = kwargs.pop(KEYS_AND_VALUES, None)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            KEYS_AND_VALUES: past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        if continuous:
            return self._continuous(given)
        why = self._not_served(given)
        if why is None:
            layer = _layer_of(past_key_values)
            if layer is None and past_key_values is not None and past_key_values.get_seq_length():
                why = "the cache was filled by the model itself"
        if why is not None:
            return self._leave_to_the_model(why, given)
        assert input_ids is not None
        self._check_once()
        keeps = self.model.config.use_cache if use_cache is None else use_cache
        temporary = layer is None and past_key_values is None and not keeps
        if layer is None:
            layer = PagedLayer(self.cache, input_ids.shape[0])
            if past_key_values is None and keeps:
                past_key_values = DynamicCache()
            if past_key_values is not None:
                past_key_values.layers = [layer]
                past_key_values.layer_class_to_replicate = None
        with torch.no_grad():
            logits = self._logits(layer, input_ids, attention_mask, position_ids, logits_to_keep)
        if temporary:
            layer.reset()
        if kwargs.get("return_dict") is False:
            return (logits, past_key_values) if past_key_values is not None else (logits,)
        return CausalLMOutputWithPast(logits=logits, **{KEYS_AND_VALUES: past_key_values})

    def _not_served(self, given: dict[str, Any]) -> str | None:
        """Why a call needs the model itself, if it does."""
        input_ids, mask = given["input_ids"], given["attention_mask"]
        if input_ids is None or given["inputs_embeds"] is not None:
            return "it passes inputs_embeds"
        if given["labels"] is not None:
            return "it asks for a loss"
        if input_ids.numel() == 0 or input_ids.dim() != 2:
            return f"input_ids has the shape {list(input_ids.shape)}"
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return "its attention_mask is not [batch, tokens]"
        config = self.model.config
        for name in ("output_attentions", "output_hidden_states"):
            wanted = given.get(name)
            if wanted or (wanted is None and getattr(config, name, False)):
                return f"it asks for {name}"
        known = {*_FORWARD, *_UNDERSTOOD}
        for name, value in given.items():
            if name not in known and value is not None:
                return f"it passes {name}"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            return "gradients are wanted (torch.no_grad() says that they are not)"
        if self.model.training:
            return "the model is in training mode"
        keep = given["logits_to_keep"]
        if mask is not None and isinstance(keep, int) and keep == 1 and not bool(mask[:, -1].all()):
            return "its attention_mask hides the last column, whose logits it asks for"
        return None

    def _leave_to_the_model(self, why: str, given: dict[str, Any]) -> Any:
        if why not in self._said:
            self._said.add(why)
            log.warning("a call of %s runs uncompiled: %s", type(self.model).__name__, why)
        return self.stock(**{name: value for name, value in given.items() if value is not None})

    def _continuous(self, given: dict[str, Any]) -> Any:
        """A step of transformers' continuous batching."""
        self._check_once()
        theirs = given["cache"]
        try:
            if theirs not in self._places:
                self._places[theirs] = Places(self.cache, theirs)
        except UnsupportedModel as why:
            return self._leave_to_the_model(str(why), given)
        ids, places = given["input_ids"].long(), given["position_ids"].long()
        if self.rope is not None:
            self.rope.check(places)
        with torch.no_grad(), self.cache.lock:
            hidden = self._hidden(ids, places, *self._places[theirs].begin(given))
            rows = given["logits_to_keep"]
            wanted = hidden[:, rows] if isinstance(rows, Tensor) else hidden
            return CausalLMOutputWithPast(logits=self._head(wanted))

    # --- a step ------------------------------------------------------------------------

    def _logits(
        self,
        layer: PagedLayer,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        wanted: int | Tensor,
    ) -> Tensor:
        batch, count = input_ids.shape
        if batch != layer.batch_size:
            raise UnsupportedModel(
                f"the cache holds {layer.batch_size} sequences, and input_ids has {batch}: pass a "
                f"cache of the same batch"
            )
        kept = self._kept(layer, mask, count)
        if positions is None:
            positions = torch.arange(layer.seen, layer.seen + count).unsqueeze(0)
        if self.rope is not None:
            self.rope.check(positions)
        positions = positions.expand(batch, count)
        before = layer.seen, layer.kept
        if kept is None:
            tokens = [count] * batch
            ids, places = input_ids.reshape(1, -1), positions.reshape(1, -1)
        else:
            tokens = kept.sum(1).tolist()
            ids, places = input_ids[kept].unsqueeze(0), positions[kept].unsqueeze(0)
        if kept is not None or layer.kept is not None:
            ones = torch.ones(batch, 1, dtype=torch.bool)
            old = layer.kept if layer.kept is not None else ones.expand(batch, layer.seen)
            layer.kept = torch.cat([old, ones.expand(batch, count) if kept is None else kept], 1)
        layer.seen += count
        lengths = [sequence.length for sequence in layer.sequences]
        try:
            held, table_rows = self.cache.extend(layer.sequences, tokens)
            hidden = self._hidden(ids, places, tokens, held, table_rows)
        except BaseException:
            layer.seen, layer.kept = before
            for sequence, length in zip(layer.sequences, lengths, strict=True):
                self.cache.crop(sequence, length)
            raise
        if kept is not None:
            whole = hidden.new_zeros(batch, count, hidden.shape[2])
            whole[kept] = hidden[0]
            hidden = whole
        else:
            hidden = hidden.view(batch, count, -1)
        if isinstance(wanted, int):
            rows = hidden[:, -wanted:] if wanted else hidden
        else:
            rows = hidden[:, wanted]
        return self._head(rows)

    def _kept(self, layer: PagedLayer, mask: Tensor | None, count: int) -> Tensor | None:
        """Which columns of a step are tokens; None where all are."""
        if mask is None:
            return None
        total = layer.seen + count
        if mask.shape[1] != total:
            raise UnsupportedModel(
                f"attention_mask has {mask.shape[1]} columns, and with {layer.seen} in the cache "
                f"and {count} new ones there are {total}: pass the mask of all of them"
            )
        if layer.kept is None and bool(mask.all()):
            return None
        mask = mask.bool()
        before, old = mask[:, : layer.seen], layer.kept
        if not (bool(before.all()) if old is None else before.equal(old)):
            raise UnsupportedModel(
                "attention_mask hides other tokens than when they were put into the cache: pass "
                "the same mask, with columns added"
            )
        return mask[:, layer.seen :]

    def _hidden(
        self,
        ids: Tensor,
        places: Tensor,
        tokens: Sequence[int],
        held: Sequence[int],
        rows: Sequence[int],
    ) -> Tensor:
        """The last hidden states [1, tokens, hidden] of the next tokens of some sequences, of which
        there is room for all, in parts of at most `max_size`."""
        cache = self.cache
        ids, places = ids.contiguous(), places.contiguous()  # other strides are another capture
        parts = []
        first, before = 0, list(held)
        for part in in_parts(tokens, self.max_size):
            which, counts = [index for index, _ in part], [count for _, count in part]
            last = first + sum(counts)
            with cache.lock:
                cache.tell(counts, [before[i] for i in which], [rows[i] for i in which])
                parts.append(
                    self.body(
                        ids[:, first:last],
                        places[:, first:last],
                        cache.blocks,
                        cache.steps,
                        cache.tables,
                    )
                )
            for index, count in part:
                before[index] += count
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _head(self, rows: Tensor) -> Tensor:
        batch, count, size = rows.shape
        parts = list(torch.split(rows.reshape(-1, size).contiguous(), self.max_size))
        parts = [self.head(part) for part in parts]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return logits.view(batch, count, -1)

    # --- once --------------------------------------------------------------------------

    def _check_once(self) -> None:
        if not self._checked:
            with self.cache.lock:  # calls of other threads wait, and the check has the cache alone
                if not self._checked:
                    self._check()

    def _check(self) -> None:
        """Compare with the model itself, on a few tokens.

        With activations in int8 what two ways of computing round differently grows too much on its
        way through the layers to tell much: there the model over the cache is compared as it is,
        not compiled, and what was compiled within wide bounds.

        Raises:
            UnsupportedModel: when logits differ by more than rounding explains.
        """
        text = self.model.config.get_text_config(decoder=True)
        window = getattr(text, "sliding_window", None) or 0
        count = max(10, min(window + 10 if window < 512 else 0, self.max_size + DECODED))
        if self.rope is not None:
            count = min(count, self.rope.positions)
        has_room = self.cache.capacity >= 2 * count + 2 * BLOCK_TOKENS
        rows = 2 if has_room and self.cache.tables.shape[0] > 1 else 1
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(0, text.vocab_size, (rows, count), generator=chance)
        within = CHECKED_WITHIN[self.model.dtype]
        if self.activations is not None:
            with self._uncompiled():
                self._compare(ids, within, None, None)
            within = ROUNDED_WITHIN
        try:
            self._compare(ids, within, self.weights, self.activations)
        except CaptureError:
            # What attention refuses is a failed capture to torch, which leaves the words out.
            with self._uncompiled(), torch.no_grad():
                self._logits(PagedLayer(self.cache, 1), ids[:1, :1], None, None, 0)
            raise
        self._checked = True

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Body and head as they are before compilation."""
        compiled = self.body, self.head
        self.body, self.head = (part.module for part in compiled)
        try:
            yield
        finally:
            self.body, self.head = compiled

    def _compare(
        self,
        ids: Tensor,
        within: float,
        weights: Weights | None,
        activations: Activations | None,
    ) -> None:
        """Compare logits of body and head with those of the model that rounds these.

        All rows are one step, as prompts and then token by token. Each row's prompt and each row's
        decoded tokens count by themselves: attention over the step at hand alone gets the first
        row's prompt right.

        Raises:
            UnsupportedModel: as `_check`.
        """
        first = max(1, ids.shape[1] - DECODED)
        with torch.no_grad():
            with rounding(self.model, weights, activations=activations):
                expected = self.stock(input_ids=ids, use_cache=False).logits.double()
            layer = PagedLayer(self.cache, ids.shape[0])
            found = [self._logits(layer, ids[:, :first], None, None, 0)]
            for column in torch.split(ids[:, first:], 1, 1):
                marked = self._mark(layer)
                found.append(self._logits(layer, column, None, None, 0))
                if marked is not None and bool(marked.isnan().all()):
                    raise UnsupportedModel(
                        f"{type(self.model).__name__} computes its attention itself, and not over "
                        f"the paged cache: leave this model to transformers"
                    )
            layer.close()
        spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
        errors = (torch.cat(found, 1).double() - expected).norm(dim=-1) / spread
        # Of most tokens that a window may hide others from: in bfloat16 a single one may go through
        # another expert.
        groups = [errors[:, :first][:, -8:], errors[:, first:]]
        error = max(float(each.median(1).values.max()) for each in groups if each.numel())
        if not error <= within:
            raise UnsupportedModel(
                f"{type(self.model).__name__} gives other logits over the paged cache (off by "
                f"{error:.1e} of their spread, {within} is allowed): leave it to transformers"
            )

    def _mark(self, layer: PagedLayer) -> Tensor | None:
        """Where the next key of the first sequence goes in each layer, with NaN there; None where
        that is in a block which it does not have yet. A graph that came from a store says nothing
        of what it calls, but it does write."""
        sequence = layer.sequences[0]
        place = sequence.length % BLOCK_TOKENS
        if not place:
            return None
        return self.cache.blocks[:, 0, sequence.blocks[-1], :, place].fill_(float("nan"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        raise UnsupportedModel(
            f"a compiled {type(self.model).__name__} cannot be copied: copy it before compile(), "
            f"or call undo(model) first"
        )

    def __repr__(self) -> str:
        rows = [("part", "captured", "ranges")]
        for name, part in (("body", self.body), ("head", self.head)):
            rows.append((name, str(part.stats().captures), " ".join(map(str, part.plan.ranges))))
        return "\n".join(align(rows, right={1}))


CHECKED_WITHIN = {torch.float32: 0.01, torch.bfloat16: 0.25}
"""How far a token's logits may be off, as a share of their spread, in the median of a few tokens.
Rounding gives some 1e-6 and 0.03, and attention that sees other keys 0.5 and more."""

ROUNDED_WITHIN = 0.7
"""The same with activations in int8, in whichever layers. SmolLM2 in bfloat16 and in float32, both
with the same rounding of all, are 0.3 apart; logits that have nothing to do with each other 1.4."""

DECODED = 3
"""Of the tokens that are compared, how many go one at a time."""

_FORWARD = (
    "input_ids",
    "attention_mask",
    "position_ids",
    KEYS_AND_VALUES,
    "inputs_embeds",
    "labels",
    "use_cache",
    "logits_to_keep",
)


def in_parts(tokens: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """The tokens of some sequences, in order, in parts of at most `most`: of each part the
    sequences, by index, and how many of their tokens."""
    part: list[tuple[int, int]] = []
    room = most
    for index, count in enumerate(tokens):
        while count:
            now = min(count, room)
            part.append((index, now))
            count, room = count - now, room - now
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part


def _other(config: Any) -> Any:
    """The configuration with attention over the paged cache."""
    other = copy.deepcopy(config)
    other._attn_implementation = NAME
    return other


def _layer_of(cache: Cache | None) -> PagedLayer | None:
    layers = getattr(cache, "layers", None) or []
    return layers[0] if layers and isinstance(layers[0], PagedLayer) else None
