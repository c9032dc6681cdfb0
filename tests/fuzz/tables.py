"""What programs are made of: operators, updates in place, results, arguments and tensors of the
module, each a template in one line.

In braces stands what is drawn: `a b` any tensor, `f g` one of floating point, `i` one of integers,
`m` one of bools, `x` a tensor argument, `s` a tensor of the module, `n` an integer that follows
from the size, `l` the last dynamic length, `d` a dimension, `k` a small number, `t` a dtype. A line
that eager PyTorch refuses at any of the sizes is left out of the program, so a template need not
fit everything it is given.
"""

from __future__ import annotations

OPERATORS: tuple[str, ...] = (
    # pointwise
    "torch.relu({f})", "{f}.sigmoid()", "F.gelu({f})", "F.silu({f})", "{f}.exp().clamp(max=9)",
    "{a} + {b}", "{a} * {b}", "{f} - {g} / 4", "{f} / (1 + {g}.abs())", "{a} * {k}", "-{a}",
    "torch.maximum({a}, {b})", "{f}.clamp(-1, 1)", "{a} == {b}", "{f} > {g}", "{m} & {m}", "~{m}",
    "torch.where({m}, {f}, {g})", "torch.where({f} > 0, {f}, 0.5)", "{f}.masked_fill({m}, -1.0)",
    "{f}.lerp({g}, 0.25)", "torch.addcmul({f}, {g}, {f})", "{i} % 3", "{i} // 2", "{f}.sign()",
    # reductions
    "{a}.sum({d})", "{a}.sum()", "{f}.mean({d}, keepdim=True)", "{a}.amax({d})", "{f}.var({d})",
    "{m}.any({d})", "{m}.all()", "{a}.argmax({d})", "{a}.max()", "{a}.prod({d})",
    "{f}.logsumexp({d})", "{f}.norm(dim={d})", "{m}.count_nonzero({d})", "{a}.max({d}).values",
    # along a dimension
    "{f}.softmax({d})", "{f}.log_softmax({d})", "{a}.cumsum({d})", "{f}.sort({d}, stable=True)",
    "{f}.topk({k}, {d})", "{f}.argsort({d}, stable=True)", "{a}.flip({d})", "{a}.roll({k}, {d})",
    "{f}.diff(dim={d})", "{a}.cummax({d}).values", "F.normalize({f}, dim={d})",
    "F.layer_norm({f}, (4,), self.scale, self.bias)", "F.rms_norm({f}, (4,))",
    "torch.bucketize({f}, self.bias.sort().values)", "{f}.unfold(-1, 2, {k})",
    # products
    "{f} @ self.weight", "F.linear({f}, self.weight, self.bias)", "F.linear({f}, self.weight.T)",
    "{f} @ {g}.transpose(-1, -2)", "{f}.transpose(0, -1) @ {g}", "torch.outer({f}, {g})",
    "torch.bmm({f}.view(-1, 2, 2), {g}.view(-1, 2, 2))", "torch.einsum('...i,ij->...j', {f}, {g})",
    "torch.einsum('ni,nj->ij', {f}, {g})", "torch.addmm(self.bias, {f}, self.weight)",
    "F.conv1d({f}.transpose(-1, -2), self.kernel, padding=1)", "torch.cdist({f}, {g})",
    "F.scaled_dot_product_attention({f}, {g}, {g})",
    "F.scaled_dot_product_attention({f}[None, None], {g}[None, None], {f}[None, None], is_causal=True)",
    # look up
    "F.embedding({i}.clamp(0, 7), self.table)", "self.table[{i}.clamp(0, 7)]",
    "{a}[{i}.clamp(0, 0)]", "{a}.gather({d}, {i}.clamp(0, 0))", "{a}.index_select({d}, {i}.clamp(0, 0))",
    "{a}.take({i}.clamp(0, 3))", "{a}[torch.arange({n}).clamp(max=0)]", "{a}.take_along_dim({i} * 0, {d})",
    "{a}.scatter({d}, {i}.clamp(0, 0), 1)", "{f}.index_add(0, {i} * 0, {g})", "{a}.index_fill({d}, {i} * 0, 2)",
    "F.one_hot({i}.clamp(0, 3), 4)", "{f}.scatter_add(0, {i} * 0, {g})", "{a}.index_copy(0, {i} * 0, {b})",
    # shapes: many of these are views
    "{a}.view(-1)", "{a}.reshape(-1, 2)", "{a}.reshape(2, -1)", "{a}.transpose(0, -1)", "{a}.mT",
    "{a}.permute(*range({a}.dim() - 1, -1, -1))", "{a}.flatten()", "{a}.unsqueeze({d})", "{a}.squeeze({d})",
    "{a}.squeeze()", "{a}.narrow({d}, 0, 1)", "{a}[:, ::2]", "{a}[::2]", "{a}[1:]", "{a}[..., :-1]", "{a}[-1]",
    "{a}[..., 0]", "{a}[None]", "{a}[:{k}]", "{a}[{n} - 1:]", "{a}[:{n}]", "{a}.expand({k}, *{a}.shape)",
    "{a}[:1].expand({n}, 4)", "{a}.view({n}, 2, 2)", "{a}.unflatten(-1, (2, 2))", "{a}.diagonal()",
    "{a}.select({d}, 0)", "{a}.split(2, -1)", "{a}.chunk(2, -1)", "{a}.tensor_split(2)", "{a}.unbind(-1)",
    "{a}.split([1, {n} - 1])", "{a}.as_strided((2, 2), (1, 1))", "{a}.movedim(0, -1)", "{a}.contiguous()",
    "{a}.clone()", "{a}.detach()", "{a}.expand_as({b})", "{a}.view_as({b})", "torch.atleast_2d({a})",
    "{a}.swapaxes(0, -1)[:1]", "{f}.real", "{a}.T", "{a}.ravel()", "{a}.view(torch.int32)", "{f}.to({f}.dtype)",
    # made of several, or made anew
    "torch.cat([{a}, {b}], {d})", "torch.stack([{a}, {b}], {d})", "torch.cat([{a}, {a}[:1]])", "torch.hstack([{a}, {b}])",
    "F.pad({a}, (1, 2))", "F.pad({a}, (0, 0, {k}, 0), value=1)", "F.pad({a}, (-1, 0))", "{a}.tril()", "{a}.triu(1)",
    "{a}.repeat(2, 1)", "{a}.repeat_interleave(2, {d})", "{a}.tile(2)", "torch.broadcast_tensors({a}, {b})",
    "torch.arange({n})", "torch.arange({n}, 0, -1)", "torch.ones({n}, 4)", "torch.zeros_like({a})", "{a}.new_full(({n},), {k})",
    "torch.full_like({f}, 0.5)", "torch.arange({n})[:, None] * {f}", "torch.eye({n})", "torch.tensor([1.0, 2.0, 3.0, 4.0])",
    "torch.meshgrid({i}, {i}, indexing='ij')", "torch.linspace(0, 1, {n})", "torch.tensor({n})", "{f} * {n}", "{a} + {n} // 2",
    "{a}.to({t})", "{f}.bfloat16()", "{f}.double()", "{a}.bool()", "{a}.long()", "{i}.float()", "{f}.type_as({g})",
    "{f} if {n} > 4 else {f} * 2", "torch.cond({f}.sum() > 0, lambda v: v + 1, lambda v: v - 1, ({f},))",
)  # fmt: skip

UPDATES: tuple[str, ...] = (
    "{x}.add_(1)", "{x}.mul_(2)", "{x}.zero_()", "{x}.copy_({a})", "{x} += 1", "{a} *= 2", "{a}.add_({b})", "{a}.neg_()",
    "{x}[:1] = 2", "{x}[0].add_(1)", "{x}[..., 0] = 3", "{x}[1:] += 1", "{x}[{n} - 1] = {k}", "{x}[:, 1].mul_(2)",
    "{x}[::2].mul_(3)", "{x}.view(-1)[:2].fill_({k})", "{x}.t().add_(1)", "{x}.transpose(0, -1)[:1].zero_()",
    "{a}.masked_fill_({m}, 0)", "{a}[{m}] = 1", "{a}[{i} * 0] = {k}", "{a}.index_fill_(0, {i} * 0, 2)",
    "{a}.index_copy_(0, {i} * 0, {b})", "{f}.index_add_(0, {i} * 0, {g})", "{a}.scatter_(0, {i} * 0, 1)",
    "{f}.index_put_(({i} * 0,), {g}, accumulate=True)", "F.relu({f}, inplace=True)", "torch.add({a}, 1, out={b})",
    "{f}.sub_(1).mul_({g})", "{f}.clamp_(-1, 1)", "torch.relu_({f})", "{a}.unsqueeze(0).add_(1)", "{a}.squeeze_(0)",
    "self.cache[:{n}] = {f}", "self.cache[:{n}].add_({f})", "self.cache.index_copy_(0, torch.arange({n}), {f})",
    "self.cache[self.count:self.count + 1] = 1", "self.cache.narrow(0, 1, {n}).copy_({f})", "self.part[:{n}] += {f}",
    "self.count.add_(1)", "self.count += {n}", "self.kv[0, :{n}] = {f}", "self.kv[:, 2:2 + {n}] += 1",
    "self.kv[0].view(-1)[:4].add_({k})", "self.kv.unbind(0)[1][:{n}].mul_(2)", "self.table[{i}.clamp(0, 7)] = 0.5",
    "self.cache.zero_()", "{s}.add_(1)", "{s}[:1].mul_(2)", "self.part.copy_(self.cache[:12])",
    "{a}.fill_diagonal_(1)", "{f}.addcmul_({f}, {g})", "{f}.t_()", "{x}.detach().add_(1)",
)  # fmt: skip

RESULTS: tuple[str, ...] = (
    "{a}", "({a}, {b})", "[{a}, {b}]", "{{'p': {a}, 'q': {b}}}", "{{'p': [{a}, ({b},)], 1: None}}", "Pair({a}, {b})",
    "({a}, None)", "({a}, {n})", "({n},)", "{n}", "({a}, 3, 'text', 2.5, True)", "({a}, torch.float32)", "None", "()",
    "{x}", "({x}, {a})", "{x}.T", "{x}[1:]", "{x}.view(-1)", "{x}[..., 0]", "{x}[{n} - 1:]", "{x}.expand(2, *{x}.shape)",
    "({x}[:1], {x}[1:])", "{x}.split(2, -1)", "({x}, {x})", "{x}.detach()", "{x}.view(torch.int32)", "{x}.unbind(0)[0]",
    "{x}.contiguous()", "{x}[:0]", "{x}.reshape(-1)", "{x}.flatten(0, 1).view({x}.shape)", "[{x}.mT, {x}.mT]",
    "{s}", "({s}, {a})", "{s}[:2]", "{s}[:{n}]", "{s}.T", "{s}.view(-1)[1:]", "({s}[:{n}], {s}[1:{n}])", "({s}, {s}.T)",
    "self.kv[0, :{n}]", "self.kv[:, :{n}].transpose(0, 1)", "({x}[:1], {s}[:1])", "self.part[:{n}]", "(self.cache, self.part)",
    "{a}.T", "({a}, {a})", "({a}, {a}.T)", "({a}[:1], {a}[1:])", "({a}, {a}[1:], {a}[..., 0])", "{a}.expand(2, *{a}.shape)",
    "{a}.chunk(2, -1)", "({f}.sum(), {f}.mean())", "{a}[:0]", "torch.empty({n}, 0)", "{a}.unsqueeze(0)", "({a}.view(-1), {a})",
    "{x}.mul_(2)", "({x}.add_(1), {x})", "({x}.add_(1), {x}.T)", "{a}.add_(1)", "({x}.mul_(2)[:1], {x}[1:])", "{s}.add_(1)",
    "Both({a}, {n})", "Both({a}, {x}.T)", "{a}.shape", "({a}, {x}.shape)", "{a}.sort(-1, stable=True)", "{f}.topk(1)",
    "slice(0, {n})", "range({n})", "({a}, float({n}))", "({a}, {n} > 3)", "({a}, str({n}))", "[{a} + i for i in range(3)]",
    "OrderedDict(p={a}, q={x})", "deque([{a}, {b}])", "(i for i in [{a}, {b}])", "{{1, 2}}", "lambda: {a}", "({a}, self)", "[]",
    "({a}, [{n}, {n} + 1])", "({a}, ({n} * 2, {n}))", "({a}.dtype, {a}.dim())", "(({a}, ({b}, [{x}])), {{'r': {x}}})",
    "list({x}.unbind(-1))", "defaultdict(list, p={a})", "({a}, -{n})", "({a}, {n} // 2, {n} % 2)", "({a}, {x}.data)",
)  # fmt: skip

ARGUMENTS: dict[str, tuple[str, dict[int, str]]] = {
    # How each is made, and which of its dimensions are dynamic ("n", "l").
    "floats": ("quarters(n, 4)", {0: "n"}),
    "again": ("quarters(n, 4)", {0: "n"}),
    "row": ("quarters(n)", {0: "n"}),
    "bf16": ("quarters(n, 4).bfloat16()", {0: "n"}),
    "ints": ("torch.randint(-3, 8, (n, 4))", {0: "n"}),
    "ids": ("torch.randint(0, 8, (n,))", {0: "n"}),
    "mask": ("torch.rand(n, 4) > 0.5", {0: "n"}),
    "flags": ("torch.rand(n) > 0.5", {0: "n"}),
    "static": ("quarters(4)", {}),
    "zero_d": ("quarters()", {}),
    "turned": ("quarters(4, n).T", {0: "n"}),
    "columns": ("quarters(n, 8)[:, ::2]", {0: "n"}),
    "later_columns": ("quarters(n, 9)[:, 3:7]", {0: "n"}),
    "rows": ("quarters(2 * n, 4)[::2]", {0: "n"}),
    "shifted": ("quarters(n + 3, 4)[3:]", {0: "n"}),
    "expanded": ("quarters(1, 4).expand(n, 4)", {0: "n"}),
    "second": ("quarters(2, n, 4)", {1: "n"}),
    "last": ("quarters(4, n)", {1: "n"}),
    "square": ("quarters(n, n)", {0: "n", 1: "n"}),
    "empty": ("torch.empty(n, 0)", {0: "n"}),
    "learnt": ("quarters(n, 4).requires_grad_()", {0: "n"}),
    "same": ("x", {0: "n"}),
    "view": ("x[:, :2]", {0: "n"}),
}  # fmt: skip

ARGUMENTS_OF_TWO: dict[str, tuple[str, dict[int, str]]] = {
    "floats": ("quarters(n, l, 4)", {0: "n", 1: "l"}),
    "again": ("quarters(n, l, 4)", {0: "n", 1: "l"}),
    "plane": ("quarters(n, l)", {0: "n", 1: "l"}),
    "ids": ("torch.randint(0, 8, (n, l))", {0: "n", 1: "l"}),
    "mask": ("torch.rand(n, l) > 0.5", {0: "n", 1: "l"}),
    "turned": ("quarters(l, n, 4).transpose(0, 1)", {0: "n", 1: "l"}),
    "per_row": ("quarters(n, 4)", {0: "n"}),
    "per_column": ("quarters(l, 4)", {0: "l"}),
    "columns": ("quarters(n, l, 8)[..., ::2]", {0: "n", 1: "l"}),
    "shifted": ("quarters(n + 3, l, 4)[3:]", {0: "n", 1: "l"}),
    "bf16": ("quarters(n, l, 4).bfloat16()", {0: "n", 1: "l"}),
    "last": ("quarters(n, 4, l)", {0: "n", 2: "l"}),
    "view": ("x[..., :2]", {0: "n", 1: "l"}),
}

STATE: dict[str, str] = {
    "weight": "self.weight = nn.Parameter(quarters(4, 4))",
    "bias": "self.bias = nn.Parameter(quarters(4))",
    "scale": "self.scale = nn.Parameter(1 + quarters(4) / 4)",
    "kernel": "self.kernel = nn.Parameter(quarters(4, 4, 3))",
    "table": "self.register_buffer('table', quarters(8, 4))",
    "cache": "self.register_buffer('cache', quarters(40, 4))",
    "part": "self.register_buffer('part', self.cache[4:16])",
    "count": "self.register_buffer('count', torch.tensor(2))",
    "kv": "self.register_buffer('kv', quarters(2, 40, 4))",
    "plain": "self.plain = quarters(4)",
}
"""Tensors of the module, in the order in which they are made."""

DTYPES = (
    *("torch.float32", "torch.bfloat16", "torch.float64"),
    *("torch.int64", "torch.int32", "torch.bool"),
)
