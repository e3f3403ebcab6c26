// The one place that starts kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace limpq::cuda {

/// A function object that launches on `stream` and raises what CUDA reports.
inline auto launcher(cudaStream_t stream) {
  return
      [stream](auto kernel, int64_t blocks, int threads, int shared_bytes, const auto& parameters) {
        kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(parameters);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) {
          throw std::runtime_error(std::string("fake quantization kernel: ") +
                                   cudaGetErrorString(error));
        }
      };
}

}  // namespace limpq::cuda
