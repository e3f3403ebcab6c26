// The library that is built where there is an nvcc: the CUDA kernels of the operators. The library
// of operators.cpp has to be loaded first.
#include "operators.h"

#include <map>
#include <mutex>

#include "cuda/fake_quantize.h"

namespace limpq {
namespace {

CUstream_st* current_stream(const Tensor& like) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

/// Zeroed counters for a backward call (see cuda/fake_quantize.h): one buffer per device and
/// stream, kept, or one of its own for a call that is being captured into a graph.
std::optional<Tensor> counters_for(const Tensor& like, CUstream_st* stream, int64_t bytes) {
  if (bytes == 0) return std::nullopt;
  const auto zeros = [&] {
    const Tensor counters = empty_bytes(bytes, like);
    fill_with_zeros(counters);
    return counters;
  };
  if (cuda::is_capturing(stream)) return zeros();
  static std::mutex mutex;
  // Never destroyed: at the end of the process the CUDA driver may be gone first.
  static auto& held = *new std::map<std::pair<int32_t, CUstream_st*>, Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = std::make_pair(like.get_device_index(), stream);
  const auto found = held.find(at);
  if (found != held.end() && found->second.numel() >= bytes) return found->second;
  return held.insert_or_assign(at, zeros()).first->second;
}

struct Cuda {
  static constexpr bool uses_host_memory = false;

  static void run_forward(const ForwardProblem* problems, int64_t count, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    cuda::fake_quantize_forward(problems, count, current_stream(like));
  }

  static void run_backward(BackwardProblem* problems, int64_t count, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    CUstream_st* const stream = current_stream(like);
    const auto counters = counters_for(like, stream, cuda::backward_counter_bytes(problems, count));
    void* const zeros = counters ? counters->mutable_data_ptr() : nullptr;
    cuda::fake_quantize_backward(problems, count, zeros, stream);
  }

  static int64_t workspace_bytes(const BackwardProblem& problem) {
    return cuda::backward_workspace_bytes(problem);
  }

  static void run_error_sums(const ErrorSumsProblem& problem, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    CUstream_st* const stream = current_stream(like);
    const auto counters = counters_for(like, stream, cuda::error_sums_counter_bytes(problem));
    cuda::error_sums(problem, counters ? counters->mutable_data_ptr() : nullptr, stream);
  }

  static int64_t workspace_bytes(const ErrorSumsProblem& problem) {
    return cuda::error_sums_workspace_bytes(problem);
  }
};

/// "key: value" lines.
std::string cuda_build_info() {
  return "cuda version: " LIMPQ_CUDA_VERSION "\ncuda architectures: " LIMPQ_CUDA_ARCHITECTURES;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(limpq_ext, m) {
  m.def("cuda_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(limpq_ext, CUDA, m) {
  Operators<Cuda>::register_all(m);
}

STABLE_TORCH_LIBRARY_IMPL(limpq_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}

}  // namespace limpq
