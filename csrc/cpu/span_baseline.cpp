// The span kernels for any processor of the target architecture (x86-64: SSE2).
#include "span_kernels.h"

#define LIMPQ_ISA baseline
#include "span_kernels.inl"
