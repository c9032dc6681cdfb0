// Quantisation of a row of norms.
#pragma once

#include <cstring>

#include "norm_rows.h"

namespace splitpoint::SPLITPOINT_ISA {

inline void quantise_fp8(const float* norm, int64_t hidden, float scale, uint8_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    store_codes(to + i, fp8_codes(load(norm + i) * scale));
  }
  if (i < hidden) {
    uint8_t codes[kLanes];
    store_codes(codes, fp8_codes(load_some(norm + i, hidden - i) * scale));
    std::memcpy(to + i, codes, hidden - i);
  }
}

inline void quantise_fp4(const float* norm, int64_t hidden, float global, uint8_t* to,
                         uint8_t* scales) {
  constexpr int64_t kParts = kFp4Block / kLanes;
  const int64_t blocks = hidden / kFp4Block;
  // As many blocks at once as a register holds scales.
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int64_t count = blocks - first < kLanes ? blocks - first : kLanes;
    float largest[kLanes] = {}, inverse[kLanes];
    for (int64_t block = 0; block < count; ++block) {
      const float* from = norm + (first + block) * kFp4Block;
      IntVec most = (IntVec)load(from) & 0x7fffffff;
      for (int64_t part = 1; part < kParts; ++part) {
        most = larger(most, (IntVec)load(from + part * kLanes) & 0x7fffffff);
      }
      largest[block] = as_float(largest_lane<kLanes>(most));
    }
    const BitVec codes = fp8_codes(load(largest) * (1.0f / 6.0f) * global);
    const Vec stored = fp8_values(codes);
    store(inverse, stored == 0.0f ? Vec{} : global / stored);
    uint8_t bytes[kLanes];
    store_codes(bytes, codes);
    std::memcpy(scales + first, bytes, count);
    for (int64_t block = 0; block < count; ++block) {
      for (int64_t part = 0; part < kParts; ++part) {
        const int64_t at = (first + block) * kFp4Block + part * kLanes;
        const Vec value = load(norm + at);
        store_pairs(to + at / 2, fp4_codes(value * inverse[block], value));
      }
    }
  }
}

// As RowNorm, for a row that is quantised next: `values` are the norm as it is returned, rounded to
// T, in order. The norm itself may not be wanted.
template <class T, class R, class W>
class RowValues : public RowNorm<T, R, W> {
 public:
  RowValues(const FusedArgs& a, int64_t row, const R* sums, float squares, float* values)
      : RowNorm<T, R, W>(a, row, sums, squares), values_(values) {}

  SPLITPOINT_INLINE void pair(int64_t i, int) {
    T rounded[kPair];
    store_pair<T>(rounded, this->value(i));
    if (this->norm_) std::memcpy(this->norm_ + i, rounded, sizeof(rounded));
    const Pair value = load_pair<T>(rounded);
    store_pair<T>(values_ + i, value);
    look(value.first);
    look(value.second);
  }

  SPLITPOINT_INLINE void some(int64_t i, int64_t count) {
    T rounded[kLanes];
    store(rounded, this->value_of_some(i, count));
    if (this->norm_) std::memcpy(this->norm_ + i, rounded, count * sizeof(T));
    const Vec value = load_some(rounded, count);
    store(values_ + i, value);
    look(value);
  }

  void quantise(const FusedArgs& a, int64_t row) const {
    const int64_t hidden = a.hidden;
    uint8_t* to = a.quantised + row * (a.quant == Quant::nvfp4 ? hidden / 2 : hidden);
    switch (a.quant) {
      case Quant::none: break;
      case Quant::fp8_static: quantise_fp8(values_, hidden, 1.0f / a.quant_scale, to); break;
      case Quant::fp8_token: {
        const float scale = as_float(largest_lane<kLanes>(most_)) / kFp8Largest;
        static_cast<float*>(a.scales)[row] = scale;
        quantise_fp8(values_, hidden, scale == 0.0f ? 0.0f : 1.0f / scale, to);
        break;
      }
      case Quant::nvfp4:
        quantise_fp4(values_, hidden, a.quant_scale, to,
                     static_cast<uint8_t*>(a.scales) + row * (hidden / kFp4Block));
        break;
    }
  }

 private:
  SPLITPOINT_INLINE void look(Vec value) { most_ = larger(most_, (IntVec)value & 0x7fffffff); }

  float* values_;
  IntVec most_ = {};
};

}  // namespace splitpoint::SPLITPOINT_ISA
