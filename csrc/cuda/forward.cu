#include "fake_quantize.h"
#include "forward.cuh"
#include "launch.cuh"

namespace limpq::cuda {

void fake_quantize_forward(const ForwardProblem* problems, int64_t count, CUstream_st* stream) {
  for (int64_t i = 0; i < count; ++i) dispatch_forward(problems[i], launcher(stream));
}

}  // namespace limpq::cuda
