// Compiled once for each instruction set, with its compiler flags and these two names.
#include "norm_kernels.h"

namespace splitpoint {

#define SPLITPOINT_TEXT_OF(name) #name
#define SPLITPOINT_TEXT(name) SPLITPOINT_TEXT_OF(name)

extern const NormTable SPLITPOINT_TABLE;
const NormTable SPLITPOINT_TABLE = {
    SPLITPOINT_TEXT(SPLITPOINT_ISA),
    SPLITPOINT_ISA::run_fused,
    SPLITPOINT_ISA::run_move,
    SPLITPOINT_ISA::run_sum,
    SPLITPOINT_ISA::run_add_bias,
    SPLITPOINT_ISA::copy_past_caches,
};

}  // namespace splitpoint
