#include "backward.cuh"
#include "fake_quantize.h"
#include "launch.cuh"

namespace limpq::cuda {

void fake_quantize_backward(const BackwardProblem& problem, CUstream_st* stream) {
  dispatch_backward(problem, launcher(stream));
}

int64_t backward_workspace_bytes(const BackwardProblem& problem) {
  return BackwardLayout::workspace_bytes(problem);
}

int64_t backward_counter_bytes(const BackwardProblem& problem) {
  return BackwardLayout::counter_bytes(problem);
}

}  // namespace limpq::cuda
