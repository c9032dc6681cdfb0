// What the collectives and the kernels of each instruction set share: plain data, no templates.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace splitpoint {

inline constexpr int kMostRanks = 8;
inline constexpr int64_t kFp4Block = 16;  // values that share a scale

enum class Element : uint8_t { f32, bf16, f16 };
enum class Quant : uint8_t { none, fp8_static, fp8_token, nvfp4 };

inline int64_t bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

// Rows of [rows, hidden], each pointer at row 0. What is not wanted is null.
struct FusedArgs {
  const char* sources[kMostRanks];  // each rank's input, in rank order
  int ranks, rank;                  // how many, and which of them this one is
  const void* residual;
  const void* weight;               // [hidden], the bias added
  void* norm;                       // of the input's type
  void* residual_out;               // of the residual's type, or the input's without one
  uint8_t* quantised;               // [rows, hidden], or [rows, hidden / 2] for nvfp4
  void* scales;                     // float [rows] for fp8_token, e4m3 [rows, hidden / 16] for nvfp4
  int64_t hidden;
  float eps;
  float quant_scale;                // as the caller gave it
  Element input, residual_type;
  Element weight_type;              // f32 or the input's
  Quant quant;
};

// out[i] = sum over the ranks of sources[rank][i].
struct SumArgs {
  const char* sources[kMostRanks];
  int ranks;
  void* out;
  Element element;
};

// The kernels of one instruction set.
struct NormTable {
  const char* name;
  void (*fused)(const FusedArgs&, int64_t row0, int64_t row1);
  // Moves what `fused` moves and computes nothing worth the name: what it may write becomes the
  // exclusive or of the inputs' and the residual's bits, which are of one type.
  void (*move)(const FusedArgs&, int64_t row0, int64_t row1);
  void (*sum)(const SumArgs&, int64_t begin, int64_t end);
  // to[i] = from[i] + bias
  void (*add_bias)(const void* from, Element element, float bias, float* to, int64_t count);
  // Into shared memory, past this core's caches. Another thread sees it only after store_fence().
  void (*copy_past_caches)(char* to, const char* from, int64_t bytes);
};

extern const NormTable kNormPortable;
#if defined(__x86_64__)
extern const NormTable kNormAvx2;
extern const NormTable kNormAvx512;
extern const NormTable kNormAvx512Bf16;
#endif

// Orders stores that went past the caches before whatever this thread publishes next.
inline void store_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace splitpoint
