// The one place that starts kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace limpq::cuda {

/// A function object that launches on `stream` and raises what CUDA reports. Its table is passed by
/// address: <<<>>> would copy it once more, and it has up to 32 KB.
inline auto launcher(cudaStream_t stream) {
  return [stream](auto kernel, int64_t blocks, int threads, int shared_bytes, auto& table) {
    void* arguments[] = {&table};
    cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                     dim3(threads), arguments, shared_bytes, stream);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("fake quantization kernel: ") +
                               cudaGetErrorString(error));
    }
  };
}

}  // namespace limpq::cuda
