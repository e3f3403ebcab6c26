#include "fake_quantize.h"
#include "forward.cuh"
#include "launch.cuh"

namespace limpq::cuda {

void fake_quantize_forward(const ForwardProblem* problems, int64_t count, CUstream_st* stream) {
  dispatch_forward(problems, count, launcher(stream));
}

}  // namespace limpq::cuda
