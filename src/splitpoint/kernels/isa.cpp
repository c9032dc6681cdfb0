// Compiled once for each instruction set, with its compiler flags and these two names.
#if defined(__AMX_BF16__)
#include "amx_kernels.h"
#define SPLITPOINT_KERNELS SPLITPOINT_ISA::tiles
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include "vnni_kernels.h"
#define SPLITPOINT_KERNELS SPLITPOINT_ISA::dots
#else
#include "cached_attention.h"
#include "linear_kernels.h"
#define SPLITPOINT_KERNELS SPLITPOINT_ISA
#endif

namespace splitpoint {

#define SPLITPOINT_TEXT_OF(name) #name
#define SPLITPOINT_TEXT(name) SPLITPOINT_TEXT_OF(name)

extern const KernelTable SPLITPOINT_TABLE;
const KernelTable SPLITPOINT_TABLE = {
    SPLITPOINT_TEXT(SPLITPOINT_ISA),   SPLITPOINT_KERNELS::kDots,
    SPLITPOINT_KERNELS::kTakesLines,   SPLITPOINT_KERNELS::kInt8Dots,
    SPLITPOINT_KERNELS::kInt4Bytes,    SPLITPOINT_KERNELS::kWidenedInt8Rows,
    SPLITPOINT_KERNELS::run_packed,    SPLITPOINT_KERNELS::run_gemv,
    SPLITPOINT_KERNELS::attend,        SPLITPOINT_KERNELS::widen,
    SPLITPOINT_KERNELS::run_pack,      SPLITPOINT_KERNELS::sum_groups,
    SPLITPOINT_KERNELS::unpack,        SPLITPOINT_KERNELS::read,
    SPLITPOINT_KERNELS::multiply,      SPLITPOINT_KERNELS::quantise,
    SPLITPOINT_KERNELS::attend_wide,   SPLITPOINT_KERNELS::attend_few,
    SPLITPOINT_KERNELS::merge_few,
};

}  // namespace splitpoint
