// What the ATen glue and the kernels of each instruction set share: plain data, no templates.
#pragma once

#include <cstdint>

namespace splitpoint {

// Columns of a packed weight that lie together; the same for every instruction set, so that
// one packed tensor serves whatever kernel is chosen later.
inline constexpr int64_t kBlock = 32;

// Rows of x for which kernels without bf16 instructions unpack a 4-bit weight in registers, at most;
// of more, they need no sums of x.
inline constexpr int64_t kMostFewRows = 28;

// The least k's of 4-bit weights that share a scale.
inline constexpr int64_t kLeastGroup = 32;

// `quads` is int8 in groups of four k's (see layout.py), which multiplies an x rounded to int8.
enum class DType { f32, bf16, i8, i4, quads };

// int32 holds the sum of so many products of an int8 and a value from -127 to 127.
inline constexpr int64_t kMostInt8Depth = 0x7fffffff / (128 * 127);

// The least scale of a row of x, 2^-120: values far below it round to zero.
inline constexpr float kLeastScale = 0x1p-120f;

enum class Activation { none, silu, gelu_tanh, gelu_erf };

struct Bf16 {
  uint16_t bits;
};

// x[t, k] @ values^T * scale + bias, of n columns.
struct Product {
  const void* values;     // packed (see pack_blocks) or plain [n, k]
  const float* scale;     // [n] or null; only for int8 weights
  const void* bias;       // [n] of y_type, or null
};

// y[t, n] = activation(first) + residual, or activation(first) * second + residual if gated. All
// strides count elements; the last dimension of every matrix is contiguous.
struct LinearArgs {
  const void* x;
  int64_t x_stride;
  Product first;
  Product second;         // only if gated
  bool gated;
  bool batch_invariant;   // a row's sums have the same order however many rows there are
  const void* residual;   // [t, n] of y_type, or null
  int64_t residual_stride;
  void* y;                // [t, n] of y_type
  int64_t y_stride;
  int64_t t;
  int64_t n;
  int64_t k;
  DType x_type;           // of x as it lies in memory: f32 also when bf16 was widened first, and
                          // i8 where it was rounded, for i4 or for quads, whose k is padded to
                          // whole ones
  DType y_type;
  DType w_type;
  Activation activation;
  int64_t group;          // k's that share a scale; only for i4 weights, which hold their scales
  bool zero_points;       // whether i4 weights have them
  bool wide_scales;       // whether their scales are fp32, not bf16
  const float* x_sums;    // [t, k / group] sums of x over each group, if there are zero points
  const float* x_scales;  // [t] of an x rounded to int8, or null
  const int32_t* x_starts;  // what the int32 sums of its rows begin at, or null: [t] of quads; of i4
                            // [k / chunk, t], for each `int4_chunk` of a group
};

// A part of the work that one thread does: rows [t0, t1) by column blocks [block0, block1).
struct Part {
  int64_t t0, t1, block0, block1;
  const void* next;       // what the thread reads after it, worth fetching; or null
};

struct PackArgs {
  const void* weight;     // [rows, k], contiguous
  void* packed;
  int64_t rows;
  int64_t k;
  DType type;
};

struct QuantiseArgs {
  const void* x;          // [t, k]
  int64_t t;
  int64_t x_stride;
  DType x_type;
  int64_t k;
  void* to;               // [t, to_stride], int8 or int16 as the kernels multiply them
  int64_t to_stride;      // of values, a multiple of 64 and no less than k
  int64_t group;          // of the i4 weights that it is for; 0 for quads
  float* scales;          // [t]
  int32_t* starts;        // as x_starts
};

struct AttentionArgs;
struct AttentionPart;
struct WideArgs;
struct CachedArgs;
struct CachedSequence;

// The kernels of one instruction set.
struct KernelTable {
  const char* name;
  bool dots_bf16;         // multiplies bf16 pairs itself; otherwise x must be widened to f32
  bool takes_lines;       // reads whole cache lines of a bf16 x at a time, so that none is read twice
  bool dots_int8;         // multiplies int8 itself; otherwise `quantise` makes int16 of x
  bool bytes_int4;        // the same for 4-bit weights
  int64_t widened_int8_rows;  // of a bf16 x which int8 weights multiply faster as fp32, at most
  void (*packed)(const LinearArgs&, const Part&);
  void (*gemv)(const LinearArgs&, const Part&);
  void (*attend)(const AttentionArgs&, const AttentionPart&);
  void (*widen)(const Bf16* from, float* to, int64_t count);
  void (*pack)(const PackArgs&, int64_t block0, int64_t block1);
  void (*sum_groups)(const LinearArgs&, int64_t t0, int64_t t1, float* to);
  void (*unpack)(const LinearArgs&, int64_t block0, int64_t block1);
  uint32_t (*read)(const char* from, int64_t bytes);
  int64_t (*multiply)(DType type, int64_t steps, float* sum);
  void (*quantise)(const QuantiseArgs&, int64_t t0, int64_t t1);
  void (*attend_wide)(const WideArgs&, int64_t item, char* scratch);
  void (*attend_few)(const CachedArgs&, const CachedSequence&, int64_t item, char* scratch);
  void (*merge_few)(const CachedArgs&, const CachedSequence&, int64_t kv_head);
};

extern const KernelTable kPortable;
#if defined(__x86_64__)
extern const KernelTable kAvx2;
extern const KernelTable kAvx2Vnni;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Vnni;
extern const KernelTable kAvx512Bf16;
extern const KernelTable kAmx;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace splitpoint
