#include "backward.cuh"
#include "fake_quantize.h"
#include "launch.cuh"

namespace limpq::cuda {

// What fake_quantize.h promises.
static_assert(Table<BackwardRows<float>, BackwardWidth<float>, Many>::most_entries == 96);
static_assert(Table<BackwardRows<double>, BackwardWidth<double>, Many>::most_entries == 82);

void fake_quantize_backward(const BackwardProblem* problems, int64_t count, void* counters,
                            CUstream_st* stream) {
  dispatch_backward(problems, count, counters, launcher(stream));
}

int64_t backward_workspace_bytes(const BackwardProblem& problem) {
  return BackwardLayout::workspace_bytes(problem);
}

int64_t backward_counter_bytes(const BackwardProblem* problems, int64_t count) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += BackwardLayout::counter_bytes(problems[i]);
  return bytes;
}

bool is_capturing(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fake quantization: ") + cudaGetErrorString(error));
  }
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace limpq::cuda
