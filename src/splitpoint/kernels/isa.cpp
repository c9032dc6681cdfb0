// Compiled once for each instruction set, with its compiler flags and these two names.
#include "cached_attention.h"
#include "linear_kernels.h"

namespace splitpoint {

#define SPLITPOINT_TEXT_OF(name) #name
#define SPLITPOINT_TEXT(name) SPLITPOINT_TEXT_OF(name)

extern const KernelTable SPLITPOINT_TABLE;
const KernelTable SPLITPOINT_TABLE = {
    SPLITPOINT_TEXT(SPLITPOINT_ISA), SPLITPOINT_ISA::kDots, SPLITPOINT_ISA::run_packed,
    SPLITPOINT_ISA::run_gemv,        SPLITPOINT_ISA::attend, SPLITPOINT_ISA::widen,
    SPLITPOINT_ISA::run_pack,        SPLITPOINT_ISA::sum_groups, SPLITPOINT_ISA::unpack,
    SPLITPOINT_ISA::read,
    SPLITPOINT_ISA::attend_cached,   SPLITPOINT_ISA::merge_cached,
};

}  // namespace splitpoint
