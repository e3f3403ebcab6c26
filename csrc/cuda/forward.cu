#include "fake_quantize.h"
#include "forward.cuh"
#include "launch.cuh"

namespace limpq::cuda {

// What fake_quantize.h promises.
static_assert(Table<ForwardRows<float>, ForwardWidth<float>, Many>::most_entries == 148);
static_assert(Table<ForwardRows<double>, ForwardWidth<double>, Many>::most_entries == 118);

void fake_quantize_forward(const ForwardProblem* problems, int64_t count, CUstream_st* stream) {
  dispatch_forward(problems, count, launcher(stream));
}

}  // namespace limpq::cuda
