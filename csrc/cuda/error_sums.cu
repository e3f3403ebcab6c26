#include "error_sums.cuh"

#include "fake_quantize.h"
#include "launch.cuh"

namespace limpq::cuda {

void error_sums(const ErrorSumsProblem& problem, void* counters, CUstream_st* stream) {
  dispatch_error_sums(problem, counters, launcher(stream));
}

int64_t error_sums_workspace_bytes(const ErrorSumsProblem& problem) {
  return ErrorSumsLayout::workspace_bytes(problem);
}

int64_t error_sums_counter_bytes(const ErrorSumsProblem& problem) {
  return ErrorSumsLayout::counter_bytes(problem);
}

}  // namespace limpq::cuda
