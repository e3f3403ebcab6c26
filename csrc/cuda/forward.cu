#include "fake_quantize.h"
#include "forward.cuh"
#include "launch.cuh"

namespace limpq::cuda {

void fake_quantize_forward(const ForwardProblem& problem, CUstream_st* stream) {
  dispatch_forward(problem, launcher(stream));
}

}  // namespace limpq::cuda
