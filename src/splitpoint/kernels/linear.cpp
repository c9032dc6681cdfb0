// The torch operators over the kernels: what is checked, allocated and split into threads.
// Compiled without instruction set flags; which kernels run is decided at load().
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "linear_types.h"

namespace splitpoint {
namespace {

using at::Tensor;

// --- the instruction set ---------------------------------------------------------------

struct Candidate {
  const KernelTable* table;
  bool runs;
};

// Best first. __builtin_cpu_supports also asks whether the system saves the registers.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    found.push_back({&kAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
    found.push_back({&kAvx512, avx512});
    found.push_back({&kAvx2, avx2});
#endif
    found.push_back({&kPortable, true});
    return found;
  }();
  return all;
}

const KernelTable* best() {
  for (const Candidate& each : candidates()) {
    if (each.runs) return each.table;
  }
  return &kPortable;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& each : candidates()) {
    if (each.runs) names.emplace_back(each.table->name);
  }
  return names;
}

// "" asks which one is in use, "best" and a name choose one.
std::string instruction_set(std::string_view name) {
  if (name == "best") chosen() = best();
  if (!name.empty() && name != "best") {
    const KernelTable* found = nullptr;
    for (const Candidate& each : candidates()) {
      if (name == each.table->name && each.runs) found = each.table;
    }
    TORCH_CHECK_VALUE(found, "this CPU has no instruction set named '", name, "'");
    chosen() = found;
  }
  return chosen().load()->name;
}

// --- threads ---------------------------------------------------------------------------

// torch's own intra-op threads, through its C interface: linking OpenMP here could bring a
// second runtime, with threads of its own, into the process.
template <class F>
void parallel(int64_t count, int64_t grain, const F& run) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&run));
  TORCH_CHECK(torch_parallel_for(0, count, grain, call, context) == 0,
              "splitpoint: a thread of a linear layer failed");
}

// What a thread must have to do before a second one is worth waking, which takes some
// microseconds: as many bytes as memory delivers, or multiplications as a core does, meanwhile.
constexpr double kBytesWorthAThread = 200e3;
constexpr double kProductsWorthAThread = 1e6;
constexpr int64_t kValuesWorthAThread = 65536;  // only copied

// Rows of x that one thread takes at least when rows are split too.
constexpr int64_t kRowsWorthAThread = 64;

void run_parallel(const LinearArgs& a, void (*kernel)(const LinearArgs&, const Part&),
                  int64_t columns, int64_t weight_bytes) {
  const int64_t blocks = ceil_div(a.n, columns);
  if (blocks == 0 || a.t == 0) return;
  // Column blocks alone keep threads apart as long as there are some for each.
  int64_t row_parts = 1;
  if (a.t >= 2 * kRowsWorthAThread) {
    uint32_t threads = 1;
    torch_get_num_threads(&threads);
    if (threads > 1 && blocks < 4 * static_cast<int64_t>(threads)) {
      row_parts = std::min(a.t / kRowsWorthAThread,
                           ceil_div(4 * static_cast<int64_t>(threads), blocks));
    }
  }
  const double products = static_cast<double>(a.t) * a.n * a.k;
  const double worth = std::max(weight_bytes / kBytesWorthAThread,
                                products / kProductsWorthAThread);
  const int64_t items = blocks * row_parts;
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(items / std::max(worth, 1.0)));
  parallel(items, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / blocks;
      const int64_t stop = std::min(end, (row + 1) * blocks);
      kernel(a, {a.t * row / row_parts, a.t * (row + 1) / row_parts, begin - row * blocks,
                 stop - row * blocks});
      begin = stop;
    }
  });
}

// Addresses this far apart share a set of the first-level cache's lines on every CPU with 64 sets
// of 64 bytes. Rows a quarter of it apart leave four sets to all rows, so many rows at the same k
// throw each other's lines out; one more line between rows gives each a set of its own.
constexpr int64_t kAliasBytes = 4096;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kCompetingRows = 8;

// --- arguments -------------------------------------------------------------------------

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kChar: return DType::i8;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or int8, got ",
                       tensor.scalar_type());
  }
}

Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "silu_mul") return Activation::silu_mul;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  TORCH_CHECK_VALUE(name == "gelu", "activation must be none, silu_mul, gelu or gelu_tanh, got ",
                    name);
  return Activation::gelu_erf;
}

// A matrix whose rows are contiguous, copied only if they are not.
c10::MaybeOwned<Tensor> with_rows(const Tensor& matrix) {
  if (matrix.stride(1) == 1 || matrix.size(1) == 1 || matrix.numel() == 0) {
    return c10::MaybeOwned<Tensor>::borrowed(matrix);
  }
  return c10::MaybeOwned<Tensor>::owned(matrix.contiguous());
}

Tensor run(const Tensor& x_given, const Tensor& weight, const std::optional<Tensor>& scale_given,
           const std::optional<Tensor>& bias_given, const std::optional<Tensor>& residual_given,
           Activation activation, int64_t n, bool packed) {
  const KernelTable* table = chosen().load(std::memory_order_relaxed);
  TORCH_CHECK_VALUE(x_given.dim() == 2, "x must be [tokens, k], got ", x_given.dim(),
                    " dimensions");
  const DType type = dtype_of(x_given, "x");
  const DType w_type = dtype_of(weight, "weight");
  TORCH_CHECK_TYPE(type != DType::i8 && (w_type == DType::i8 || w_type == type),
                   "x must be float32 or bfloat16 and the weight of its dtype or int8, got ",
                   x_given.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.is_contiguous(), "the weight must be contiguous");
  const int64_t k = x_given.size(1), t = x_given.size(0);
  const int64_t w_rows = activation == Activation::silu_mul ? 2 * n : n;
  if (packed) {
    const int64_t blocks = ceil_div(n, packed_block_columns(activation));
    const int64_t even = ceil_div(k, 2);
    const bool fits =
        w_type == DType::bf16
            ? weight.dim() == 4 && weight.size(0) == blocks && weight.size(1) == even &&
                  weight.size(2) == kBlock && weight.size(3) == 2
            : weight.dim() == 3 && weight.size(0) == blocks &&
                  weight.size(1) == (w_type == DType::i8 ? 2 * even : k) &&
                  weight.size(2) == kBlock;
    TORCH_CHECK_VALUE(fits, "a packed weight of shape ", weight.sizes(), " is not one for k = ", k,
                      " and ", n, " columns: pack_weight() makes it");
  } else {
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == k && weight.size(0) == w_rows,
                      "a weight of shape ", weight.sizes(), " does not fit x of shape ",
                      x_given.sizes());
  }
  LinearArgs a{};
  a.t = t, a.n = n, a.k = k;
  a.x_type = type, a.y_type = type, a.w_type = w_type;
  a.activation = activation;
  a.weight = weight.const_data_ptr();

  c10::MaybeOwned<Tensor> scale, bias, residual;
  TORCH_CHECK_VALUE(scale_given.has_value() == (w_type == DType::i8),
                    "an int8 weight needs its scale, and no other weight has one");
  if (scale_given) {
    TORCH_CHECK_VALUE(scale_given->scalar_type() == at::kFloat && scale_given->dim() == 1 &&
                          scale_given->size(0) == w_rows,
                      "scale must be float32 [", w_rows, "]");
    scale = scale_given->expect_contiguous();
    a.scale = static_cast<const float*>(scale->const_data_ptr());
  }
  if (bias_given) {
    TORCH_CHECK_VALUE(bias_given->scalar_type() == x_given.scalar_type() &&
                          bias_given->dim() == 1 && bias_given->size(0) == w_rows,
                      "bias must be of x's dtype and [", w_rows, "]");
    bias = bias_given->expect_contiguous();
    a.bias = bias->const_data_ptr();
  }
  if (residual_given) {
    TORCH_CHECK_VALUE(residual_given->scalar_type() == x_given.scalar_type() &&
                          residual_given->dim() == 2 && residual_given->size(0) == t &&
                          residual_given->size(1) == n,
                      "residual must be of x's dtype and [", t, ", ", n, "]");
    residual = with_rows(*residual_given);
    a.residual = residual->const_data_ptr();
    a.residual_stride = residual->stride(0);
  }
  const c10::MaybeOwned<Tensor> x = with_rows(x_given);
  a.x = x->const_data_ptr();
  a.x_stride = x->stride(0);
  Tensor y = at::empty({t, n}, x_given.options());
  a.y = y.mutable_data_ptr();
  a.y_stride = n;

  // x is copied where the kernels cannot use it as it is: bf16 without bf16 instructions, and
  // rows so far apart that they would all compete for the same few cache lines.
  const bool widens =
      type == DType::bf16 && (!table->dots_bf16 || (!packed && w_type == DType::i8));
  const int64_t item = type == DType::f32 || widens ? 4 : 2;
  const bool spreads = packed && t >= kCompetingRows && k * item >= kAliasBytes / 4 &&
                       (widens ? k : a.x_stride) * item % (kAliasBytes / 4) == 0;
  Tensor copy;
  if (widens || spreads) {
    const int64_t stride = spreads ? k + kLineBytes / item : k;
    copy = at::empty({t * stride}, x_given.options().dtype(item == 4 ? at::kFloat : at::kBFloat16));
    auto* to = static_cast<char*>(copy.mutable_data_ptr());
    const auto* from = static_cast<const char*>(a.x);
    const int64_t from_bytes = a.x_stride * x_given.itemsize();
    parallel(t, std::max<int64_t>(1, kValuesWorthAThread / std::max<int64_t>(k, 1)),
             [&](int64_t begin, int64_t end) {
               for (int64_t row = begin; row < end; ++row) {
                 char* target = to + row * stride * item;
                 const char* source = from + row * from_bytes;
                 if (widens) {
                   table->widen(reinterpret_cast<const Bf16*>(source),
                                reinterpret_cast<float*>(target), k);
                 } else {
                   std::memcpy(target, source, k * item);
                 }
               }
             });
    a.x = to;
    a.x_stride = stride;
    if (widens) a.x_type = DType::f32;
  }
  run_parallel(a, packed ? table->packed : table->gemv,
               packed ? packed_block_columns(activation) : kBlock,
               static_cast<int64_t>(weight.nbytes()));
  return y;
}

// --- operators -------------------------------------------------------------------------

Tensor linear_packed(const Tensor& x, const Tensor& weight, int64_t n,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, std::string_view activation) {
  TORCH_CHECK_VALUE(n >= 0, "n must not be negative, got ", n);
  return run(x, weight, scale, bias, residual, activation_of(activation), n, true);
}

Tensor linear_gemv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   std::string_view activation) {
  const Activation kind = activation_of(activation);
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [rows, k], got ", weight.dim(),
                    " dimensions");
  const bool two = kind == Activation::silu_mul;
  TORCH_CHECK_VALUE(!two || weight.size(0) % 2 == 0,
                    "silu_mul needs an even number of weight rows, got ", weight.size(0));
  return run(x, weight, scale, bias, residual, kind, weight.size(0) / (two ? 2 : 1), false);
}

Tensor pack_weight(const Tensor& weight, bool gate_up) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [rows, k], got ", weight.dim(),
                    " dimensions");
  const DType type = dtype_of(weight, "weight");
  const int64_t rows = weight.size(0), k = weight.size(1), even = ceil_div(k, 2);
  TORCH_CHECK_VALUE(!gate_up || rows % 2 == 0,
                    "gate_up needs an even number of weight rows, got ", rows);
  const int64_t blocks = gate_up ? ceil_div(rows / 2, kBlock / 2) : ceil_div(rows, kBlock);
  const auto contiguous = weight.expect_contiguous();
  Tensor packed =
      type == DType::bf16
          ? at::empty({blocks, even, kBlock, 2}, weight.options())
          : at::empty({blocks, type == DType::i8 ? 2 * even : k, kBlock}, weight.options());
  const PackArgs a{contiguous->const_data_ptr(), packed.mutable_data_ptr(), rows, k, type,
                   gate_up};
  if (packed.numel() > 0) {
    parallel(blocks, std::max<int64_t>(1, kValuesWorthAThread / (kBlock * k)),
             [&](int64_t begin, int64_t end) { kPortable.pack(a, begin, end); });
  }
  return packed;
}

// Reads a tensor's memory in all threads, for measuring bandwidth; the result is of no use.
int64_t read_memory(const Tensor& data) {
  TORCH_CHECK_VALUE(data.is_contiguous(), "data must be contiguous");
  const KernelTable* table = chosen().load();
  const auto* from = static_cast<const char*>(data.const_data_ptr());
  std::atomic<uint32_t> total{0};
  parallel(static_cast<int64_t>(data.nbytes()), 1 << 20, [&](int64_t begin, int64_t end) {
    total ^= table->read(from + begin, end - begin);
  });
  return total;
}

}  // namespace

TORCH_LIBRARY(splitpoint, m) {
  m.def("pack_weight(Tensor weight, bool gate_up=False) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_packed(Tensor x, Tensor weight, SymInt n, Tensor? scale=None, Tensor? bias=None, "
      "Tensor? residual=None, str activation=\"none\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_gemv(Tensor x, Tensor weight, Tensor? scale=None, Tensor? bias=None, "
      "Tensor? residual=None, str activation=\"none\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("read_memory(Tensor data) -> int", {at::Tag::pt2_compliant_tag});
  m.def("instruction_sets() -> str[]", instruction_sets);
  m.def("instruction_set(str name) -> str", instruction_set);
}

TORCH_LIBRARY_IMPL(splitpoint, CPU, m) {
  m.impl("pack_weight", pack_weight);
  m.impl("linear_packed", linear_packed);
  m.impl("linear_gemv", linear_gemv);
  m.impl("read_memory", read_memory);
}

}  // namespace splitpoint
