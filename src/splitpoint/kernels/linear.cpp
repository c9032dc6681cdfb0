// The torch operators over the kernels: what is checked, allocated and split into threads.
// Compiled without instruction set flags; which kernels run is decided at load().
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "glue.h"
#include "linear.h"

namespace splitpoint {
namespace {

using at::Tensor;

// --- threads ---------------------------------------------------------------------------

constexpr int64_t kValuesWorthAThread = 65536;  // only copied

// Rows of x that one thread takes at least when rows are split too.
constexpr int64_t kRowsWorthAThread = 64;
static_assert(kRowsWorthAThread > kMostFewRows, "a part of many rows has no sums of x");

// Runs layers of the same x: the column blocks of all of them are shared out as one row of work.
void run_parallel(c10::ArrayRef<LinearArgs> layers,
                  void (*kernel)(const LinearArgs&, const Part&), int64_t weight_bytes) {
  const int64_t t = layers[0].t;
  c10::SmallVector<int64_t, 3> ends;  // of each layer's blocks
  double products = 0;
  for (const LinearArgs& a : layers) {
    ends.push_back((ends.empty() ? 0 : ends.back()) + ceil_div(a.n, kBlock));
    products += static_cast<double>(t) * a.n * a.k * (a.gated ? 2 : 1);
  }
  const int64_t blocks = ends.back();
  if (blocks == 0 || t == 0) return;
  // Column blocks alone keep threads apart as long as there are some for each.
  int64_t row_parts = 1;
  if (t >= 2 * kRowsWorthAThread) {
    uint32_t threads = 1;
    torch_get_num_threads(&threads);
    if (threads > 1 && blocks < 4 * static_cast<int64_t>(threads)) {
      row_parts = std::min(t / kRowsWorthAThread,
                           ceil_div(4 * static_cast<int64_t>(threads), blocks));
    }
  }
  const double worth = std::max(weight_bytes / kBytesWorthAThread,
                                products / kProductsWorthAThread);
  const int64_t items = blocks * row_parts;
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(items / std::max(worth, 1.0)));
  parallel(items, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / blocks, block = begin % blocks;
      const size_t i = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
      const int64_t first = i ? ends[i - 1] : 0;
      const int64_t stop = std::min(end, row * blocks + ends[i]);
      const bool goes_on = stop < end && stop < (row + 1) * blocks;
      kernel(layers[i], {t * row / row_parts, t * (row + 1) / row_parts, block - first,
                         stop - row * blocks - first,
                         goes_on ? layers[i + 1].first.values : nullptr});
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

DType dtype_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kChar: return DType::i8;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or int8, got ",
                       type);
  }
}

// How the groups of a packed 4-bit weight, uint8 [blocks, groups, bytes], lie; see linear_int4.h.
struct GroupLayout {
  int64_t group = 0;
  bool zero_points = false, wide_scales = false;

  explicit GroupLayout(const Tensor& packed) {
    const int64_t bytes = packed.dim() == 3 ? packed.size(2) : 0;
    for (const int64_t each : {32, 64, 128}) {
      for (const bool zeros : {false, true}) {
        for (const bool wide : {false, true}) {
          if (bytes != ((wide ? 4 : 2) + (zeros ? 1 : 0) + each / 2) * kBlock) continue;
          group = each, zero_points = zeros, wide_scales = wide;
        }
      }
    }
    TORCH_CHECK_VALUE(group, "a packed 4-bit weight is uint8 [blocks, groups, bytes] with groups ",
                      "of 32, 64 or 128, got ", packed.sizes());
  }
  bool fits(const Tensor& packed, int64_t blocks, int64_t k) const {
    return packed.size(0) == blocks && packed.size(1) * group == k;
  }
};

Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  TORCH_CHECK_VALUE(name == "gelu", "activation must be none, silu, gelu or gelu_tanh, got ", name);
  return Activation::gelu_erf;
}

// A tensor as rows along its last dimension, copied only if they do not lie evenly.
struct Rows {
  c10::MaybeOwned<Tensor> held;
  const void* data;
  int64_t stride;

  explicit Rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    bool even = tensor.stride(last) == 1 || tensor.size(last) == 1 || tensor.numel() == 0;
    stride = tensor.size(last);
    int64_t rows = 1;  // below the dimension looked at
    for (int64_t d = last - 1; d >= 0; --d) {
      if (tensor.size(d) == 1) continue;
      if (rows == 1) stride = tensor.stride(d);
      even = even && tensor.stride(d) == stride * rows;
      rows *= tensor.size(d);
    }
    even = even || tensor.numel() == 0;
    held = even ? c10::MaybeOwned<Tensor>::borrowed(tensor)
                : c10::MaybeOwned<Tensor>::owned(tensor.contiguous());
    if (!even) stride = tensor.size(last);
    data = held->const_data_ptr();
  }
};

// Rows of x rounded to int8, as the kernels of these layers' weights take them.
struct Rounded {
  Tensor held;
  QuantiseArgs args;

  Rounded(const KernelTable& table, const Rows& x, const LinearArgs& of, int64_t t) {
    const bool int4 = of.w_type == DType::i4;
    const int64_t item = (int4 ? table.bytes_int4 : table.dots_int8) ? 1 : 2;
    const int64_t starts = int4 ? ceil_div(of.k, kLeastGroup) : 1;  // of a row, at most
    int64_t stride = ceil_div(of.k, kLineBytes) * kLineBytes;
    if (stride * item % (kAliasBytes / 4) == 0) stride += kLineBytes;
    const int64_t values = t * stride * item;
    held = at::empty({values + t * 4 * (1 + starts)}, x.held->options().dtype(at::kByte));
    auto* to = static_cast<char*>(held.mutable_data_ptr());
    auto* scales = reinterpret_cast<float*>(to + values);
    args = {x.data, t, x.stride, of.x_type, of.k, to, stride, of.group,
            scales, reinterpret_cast<int32_t*>(scales + t)};
    parallel(t, std::max<int64_t>(1, kValuesWorthAThread / std::max<int64_t>(of.k, 1)),
             [&](int64_t begin, int64_t end) { table.quantise(args, begin, end); });
  }
  void give(LinearArgs& a) const {
    a.x = args.to, a.x_stride = args.to_stride, a.x_type = DType::i8;
    a.x_scales = args.scales, a.x_starts = args.starts;
  }
};

// One of the lists that hold a tensor for each weight, or none at all.
const Tensor* each_of(at::TensorList list, size_t i, size_t count, const char* name) {
  TORCH_CHECK_VALUE(list.empty() || list.size() == count, "there must be as many ", name,
                    " as weights, ", count, ", or none, got ", list.size());
  return list.empty() ? nullptr : &list[i];
}

}  // namespace

LinearLayers linear_layers(at::ScalarType scalar_type, int64_t k, const LinearGiven& given) {
  LinearLayers made;
  made.packed = given.n.has_value();
  const size_t count = given.weights.size();
  TORCH_CHECK_VALUE(count > 0 && (!given.gated || count == 2), "there must be ",
                    given.gated ? "two weights, of the gate and of what it gates" : "a weight",
                    ", got ", count);
  TORCH_CHECK_VALUE(!made.packed || given.n->size() == count,
                    "n must hold the columns of each weight");
  const DType type = dtype_of(scalar_type, "x");
  const bool int4 = made.packed && given.weights[0].scalar_type() == at::kByte;
  const bool quads = made.packed && given.weights[0].scalar_type() == at::kChar &&
                     given.weights[0].dim() == 4;
  const DType w_type = int4    ? DType::i4
                       : quads ? DType::quads
                               : dtype_of(given.weights[0].scalar_type(), "weight");
  TORCH_CHECK_VALUE(!quads || k <= kMostInt8Depth, "int32 sums of int8 products hold a k of ",
                    kMostInt8Depth, " at most, got ", k);
  LinearArgs common{};
  common.k = k;
  common.x_type = type, common.y_type = type, common.w_type = w_type;
  common.activation = activation_of(given.activation);
  common.gated = given.gated;
  common.batch_invariant = given.batch_invariant;
  made.rounds_x = quads || given.round_x;
  TORCH_CHECK_VALUE(!made.rounds_x || quads || int4,
                    "round_x is for packed weights of 4 bits, and for int8 in groups of four, got ",
                    given.weights[0].scalar_type());
  TORCH_CHECK_VALUE(!given.batch_invariant || !int4 || given.round_x,
                    "4-bit weights are summed in another order for few rows: batch_invariant "
                    "needs others");
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = given.weights[i];
    TORCH_CHECK_TYPE(type != DType::i8 &&
                         (int4 || quads || w_type == DType::i8 || w_type == type) &&
                         weight.scalar_type() == given.weights[0].scalar_type(),
                     "x must be float32 or bfloat16 and the weights of its dtype or int8, got ",
                     scalar_type, " and ", weight.scalar_type());
    TORCH_CHECK_VALUE(weight.is_contiguous(), "the weight must be contiguous");
    TORCH_CHECK_VALUE(made.packed || weight.dim() == 2, "weight must be [n, k], got ",
                      weight.dim(), " dimensions");
    const int64_t n = made.packed ? (*given.n)[i] : weight.size(0);
    TORCH_CHECK_VALUE(n >= 0, "n must not be negative, got ", n);
    if (made.packed) {
      const int64_t blocks = ceil_div(n, kBlock), even = ceil_div(k, 2);
      if (int4) {
        const GroupLayout layout(weight);
        TORCH_CHECK_VALUE(i == 0 || (layout.group == common.group &&
                                     layout.zero_points == common.zero_points &&
                                     layout.wide_scales == common.wide_scales),
                          "the weights of one x must have groups alike");
        common.group = layout.group, common.zero_points = layout.zero_points;
        common.wide_scales = layout.wide_scales;
      }
      const bool fits =
          int4 ? GroupLayout(weight).fits(weight, blocks, k)
          : quads
              ? weight.dim() == 4 && weight.size(0) == blocks &&
                    weight.size(1) == ceil_div(k, 4) && weight.size(2) == kBlock &&
                    weight.size(3) == 4
          : w_type == DType::bf16
              ? weight.dim() == 4 && weight.size(0) == blocks && weight.size(1) == even &&
                    weight.size(2) == kBlock && weight.size(3) == 2
              : weight.dim() == 3 && weight.size(0) == blocks &&
                    weight.size(1) == (w_type == DType::i8 ? 2 * even : k) &&
                    weight.size(2) == kBlock;
      TORCH_CHECK_VALUE(fits, "a packed weight of shape ", weight.sizes(), " is not one for k = ",
                        k, " and ", n, " columns: pack_weight() makes it");
    } else {
      TORCH_CHECK_VALUE(weight.size(1) == k, "a weight of shape ", weight.sizes(),
                        " does not fit x of ", k, " columns");
    }
    Product product{weight.const_data_ptr(), nullptr, nullptr};
    made.weight_bytes += static_cast<int64_t>(weight.nbytes());
    TORCH_CHECK_VALUE(given.scales.empty() == (w_type != DType::i8 && !quads),
                      "an int8 weight needs its scale, and no other weight has one");
    if (const Tensor* scale = each_of(given.scales, i, count, "scales")) {
      TORCH_CHECK_VALUE(
          scale->scalar_type() == at::kFloat && scale->dim() == 1 && scale->size(0) == n,
          "scale must be float32 [", n, "]");
      made.held.push_back(scale->expect_contiguous());
      product.scale = static_cast<const float*>(made.held.back()->const_data_ptr());
    }
    if (const Tensor* bias = each_of(given.biases, i, count, "biases")) {
      TORCH_CHECK_VALUE(
          bias->scalar_type() == scalar_type && bias->dim() == 1 && bias->size(0) == n,
          "bias must be of x's dtype and [", n, "]");
      made.held.push_back(bias->expect_contiguous());
      product.bias = made.held.back()->const_data_ptr();
    }
    if (given.gated && i == 1) {
      LinearArgs& gate = made.layers[0];
      TORCH_CHECK_VALUE(n == gate.n, "a gate of ", gate.n, " columns cannot gate ", n);
      gate.second = product;
      break;
    }
    LinearArgs a = common;
    a.n = a.y_stride = n;
    a.first = product;
    made.layers.push_back(a);
  }
  return made;
}

void run_linear(const LinearLayers& made, const Tensor& x_given, const Tensor* residual_given,
                at::ArrayRef<Tensor> y) {
  const KernelTable* table = kernels_in_use();
  c10::SmallVector<LinearArgs, 3> layers = made.layers;
  LinearArgs& first = layers[0];
  const int64_t k = first.k;
  const int64_t t = c10::multiply_integers(x_given.sizes().slice(0, x_given.dim() - 1));
  const bool bf16 = first.x_type == DType::bf16;

  std::optional<Rows> residual;
  if (residual_given) {
    TORCH_CHECK_VALUE(layers.size() == 1, "only a single result can have a residual added");
    TORCH_CHECK_VALUE(residual_given->scalar_type() == x_given.scalar_type() &&
                          residual_given->sizes() == y[0].sizes(),
                      "residual must be of x's dtype and ", y[0].sizes());
    residual.emplace(*residual_given);
    first.residual = residual->data;
    first.residual_stride = residual->stride;
  }
  const Rows x(x_given);
  const void* x_data = x.data;
  int64_t x_stride = x.stride;
  if (made.rounds_x) {
    const Rounded rounded(*table, x, first, t);
    for (size_t i = 0; i < layers.size(); ++i) {
      LinearArgs& a = layers[i];
      a.t = t;
      if (a.w_type == DType::quads) a.k = ceil_div(k, 4) * 4;
      a.y = y[i].mutable_data_ptr();
      rounded.give(a);
    }
    run_parallel(layers, table->packed, made.weight_bytes);
    return;
  }

  // x is copied where the kernels cannot use it as it is, or not as fast: bf16 without bf16
  // instructions, few rows over int8 (`widened_int8_rows`), and rows so far apart that they would all
  // compete for the same few cache lines.
  const bool few = t <= table->widened_int8_rows && !first.batch_invariant;
  const bool widens_int8 = first.w_type == DType::i8 && (few || !made.packed);
  const bool widens = bf16 && (!table->dots_bf16 || widens_int8);
  const int64_t item = !bf16 || widens ? 4 : 2;
  const bool competes = made.packed && t >= kCompetingRows && (item == 4 || !table->takes_lines);
  const bool spreads = competes && k * item >= kAliasBytes / 4 &&
                       (widens ? k : x_stride) * item % (kAliasBytes / 4) == 0;
  Tensor copy;
  if (widens || spreads) {
    const int64_t stride = spreads ? k + kLineBytes / item : k;
    copy = at::empty({t * stride}, x_given.options().dtype(item == 4 ? at::kFloat : at::kBFloat16));
    auto* to = static_cast<char*>(copy.mutable_data_ptr());
    const auto* from = static_cast<const char*>(x_data);
    const int64_t from_bytes = x_stride * x_given.itemsize();
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
    x_data = to;
    x_stride = stride;
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    LinearArgs& a = layers[i];
    a.t = t;
    a.y = y[i].mutable_data_ptr();
    a.x = x_data;
    a.x_stride = x_stride;
    if (widens) a.x_type = DType::f32;
  }
  Tensor x_sums;
  if (first.zero_points && (t <= kMostFewRows || (bf16 && table->dots_bf16))) {
    x_sums = at::empty({t, k / first.group}, x_given.options().dtype(at::kFloat));
    auto* to = static_cast<float*>(x_sums.mutable_data_ptr());
    const int64_t groups = k / first.group;
    parallel(t, std::max<int64_t>(1, kValuesWorthAThread / std::max<int64_t>(k, 1)),
             [&](int64_t begin, int64_t end) {
               table->sum_groups(first, begin, end, to + begin * groups);
             });
    for (LinearArgs& a : layers) a.x_sums = to;
  }
  run_parallel(layers, made.packed ? table->packed : table->gemv, made.weight_bytes);
}

namespace {

// --- operators -------------------------------------------------------------------------

std::vector<Tensor> run(const Tensor& x, const LinearGiven& given,
                        const std::optional<Tensor>& residual) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x must be [..., k], got no dimension");
  const LinearLayers made = linear_layers(x.scalar_type(), x.size(-1), given);
  at::DimVector shape(x.sizes());
  std::vector<Tensor> results;
  results.reserve(made.layers.size());
  for (const LinearArgs& layer : made.layers) {
    shape.back() = layer.n;
    results.push_back(at::empty(shape, x.options()));
  }
  run_linear(made, x, residual ? &*residual : nullptr, results);
  return results;
}

std::vector<Tensor> linear_packed(const Tensor& x, at::TensorList weights, at::IntArrayRef n,
                                  at::TensorList scales, at::TensorList biases,
                                  const std::optional<Tensor>& residual,
                                  std::string_view activation, bool gated, bool batch_invariant,
                                  bool round_x) {
  return run(x, {weights, n, scales, biases, activation, gated, batch_invariant, round_x},
             residual);
}

std::vector<Tensor> linear_gemv(const Tensor& x, at::TensorList weights, at::TensorList scales,
                                at::TensorList biases, const std::optional<Tensor>& residual,
                                std::string_view activation, bool gated) {
  return run(x, {weights, std::nullopt, scales, biases, activation, gated}, residual);
}

Tensor pack_weight(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [n, k], got ", weight.dim(), " dimensions");
  const DType type = dtype_of(weight.scalar_type(), "weight");
  const int64_t rows = weight.size(0), k = weight.size(1), even = ceil_div(k, 2);
  const int64_t blocks = ceil_div(rows, kBlock);
  const auto contiguous = weight.expect_contiguous();
  Tensor packed =
      type == DType::bf16
          ? at::empty({blocks, even, kBlock, 2}, weight.options())
          : at::empty({blocks, type == DType::i8 ? 2 * even : k, kBlock}, weight.options());
  const PackArgs a{contiguous->const_data_ptr(), packed.mutable_data_ptr(), rows, k, type};
  if (packed.numel() > 0) {
    parallel(blocks, std::max<int64_t>(1, kValuesWorthAThread / (kBlock * k)),
             [&](int64_t begin, int64_t end) { kPortable.pack(a, begin, end); });
  }
  return packed;
}

// The weight of int8 or 4 bits in a packed layout as a plain [k, n] of `dtype`.
Tensor unpack_weight(const Tensor& packed, const std::optional<Tensor>& scale, int64_t n, int64_t k,
                     at::ScalarType dtype) {
  const std::vector<Tensor> scales = scale ? std::vector{*scale} : std::vector<Tensor>{};
  const std::vector<int64_t> columns{n};
  const Tensor weights[] = {packed};
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kChar || packed.scalar_type() == at::kByte,
                   "packed must be int8, or uint8 for 4 bits, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(k >= 0, "k must not be negative, got ", k);
  const LinearLayers made = linear_layers(dtype, k, {weights, columns, scales, {}, "none", false});
  TORCH_CHECK_VALUE(made.layers[0].w_type != DType::quads,
                    "packed must lie as pack_weight() makes it, got int8 ", packed.sizes());
  LinearArgs a = made.layers[0];
  Tensor result = at::empty({k, n}, packed.options().dtype(dtype));
  a.y = result.mutable_data_ptr();
  if (result.numel() > 0) {
    const KernelTable* table = kernels_in_use();
    parallel(ceil_div(n, kBlock), std::max<int64_t>(1, kValuesWorthAThread / (kBlock * k)),
             [&](int64_t begin, int64_t end) { table->unpack(a, begin, end); });
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(splitpoint, m) {
  m.def("pack_weight(Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_packed(Tensor x, Tensor[] weights, SymInt[] n, Tensor[] scales, "
      "Tensor[] biases, Tensor? residual=None, str activation=\"none\", bool gated=False, "
      "bool batch_invariant=False, bool round_x=False) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_gemv(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, "
      "Tensor? residual=None, str activation=\"none\", bool gated=False) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "unpack_weight(Tensor packed, Tensor? scale, SymInt n, SymInt k, ScalarType dtype) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(splitpoint, CPU, m) {
  m.impl("pack_weight", pack_weight);
  m.impl("unpack_weight", unpack_weight);
  m.impl("linear_packed", linear_packed);
  m.impl("linear_gemv", linear_gemv);
}

}  // namespace splitpoint
