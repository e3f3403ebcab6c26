// How the kernels read and write memory: 16 bytes at a time where that is possible.
//
// These headers compile for the host too: there tests/cpp/cuda_on_host.h, included first, stands in
// for what nvcc provides.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../fake_quantize.h"
#include "division.cuh"

namespace limpq::cuda {

template <typename T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};
template <typename T>
using ComputeType = typename Compute<T>::Type;

/// Calls visit(T()) with the type that stores one element.
template <typename Visit>
void with_type(DataType dtype, Visit&& visit) {
  switch (dtype) {
    case DataType::float32:
      return visit(float());
    case DataType::float64:
      return visit(double());
    case DataType::float16:
      return visit(__half());
    case DataType::bfloat16:
      return visit(__nv_bfloat16());
  }
}

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

__device__ __forceinline__ void narrow(float value, float& to) {
  to = value;
}
__device__ __forceinline__ void narrow(double value, double& to) {
  to = value;
}
__device__ __forceinline__ void narrow(float value, __half& to) {
  to = __float2half_rn(value);
}
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(value);
}

/// Elements in 16 bytes.
template <typename T>
constexpr int vector_size = 16 / sizeof(T);

/// `size` neighbouring elements in registers: 16 bytes, or one element.
template <typename T, int size = vector_size<T>>
struct alignas(sizeof(T) * size) Pack {
  static_assert(sizeof(T) * size == 16 || size == 1, "one access each");
  T element[size];
};

template <int size, typename T>
__device__ __forceinline__ Pack<T, size> load_pack(const T* from) {
  Pack<T, size> pack;
  if constexpr (size == 1) {
    pack.element[0] = *from;
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &bits, sizeof(bits));
  }
  return pack;
}

template <typename T, int size>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, size>& pack) {
  if constexpr (size == 1) {
    *to = pack.element[0];
  } else {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(to), bits);  // an assignment is split into narrower stores
  }
}

template <typename T, int size>
__device__ __forceinline__ void widen(const Pack<T, size>& pack, ComputeType<T> (&values)[size]) {
#pragma unroll
  for (int j = 0; j < size; ++j) values[j] = widen(pack.element[j]);
}

template <typename T, int size>
__device__ __forceinline__ Pack<T, size> narrow(const ComputeType<T> (&values)[size]) {
  Pack<T, size> pack;
#pragma unroll
  for (int j = 0; j < size; ++j) narrow(values[j], pack.element[j]);
  return pack;
}

/// Whether the fast division is right for all of `values`. float16 has nothing smaller than 2^-24.
template <typename T, int size>
__device__ __forceinline__ bool all_tame(const ComputeType<T> (&values)[size]) {
  bool tame = true;
  if constexpr (sizeof(ComputeType<T>) == sizeof(float)) {
    if constexpr (!std::is_same_v<T, __half>) {
#pragma unroll
      for (int j = 0; j < size; ++j) tame &= is_tame(values[j]);
    }
  }
  return tame;
}

/// One pack's place in a row: 16 bytes of every tensor of the call, of which the elements
/// begin .. end - 1 belong to the row.
template <typename T>
struct Span {
  static constexpr int V = vector_size<T>;
  int64_t at;  // of the pack's first element in the tensor; may lie before the row
  int begin;
  int end;
  bool vector;  // all of it belongs to the row, and it is aligned

  /// Elements outside the row are 0, which has no part in any sum.
  __device__ __forceinline__ Pack<T> load(const T* tensor) const {
    const T* from = tensor + at;
    if (vector) return load_pack<V>(from);
    Pack<T> values;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= begin && j < end) {
        values.element[j] = from[j];
      } else {
        narrow(ComputeType<T>(0), values.element[j]);
      }
    }
    return values;
  }

  __device__ __forceinline__ void store(T* tensor, const Pack<T>& values) const {
    T* to = tensor + at;
    if (vector) {
      store_pack(to, values);
      return;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j >= begin && j < end) to[j] = values.element[j];
    }
  }
};

/// One contiguous row as a sequence of packs that start at addresses divisible by 16.
///
/// Pack i holds the elements i * V - head .. i * V - head + V - 1; the first and the last one may
/// reach over the row's ends. Those are read and written element by element, and so is everything
/// where the tensors of the call are not all misaligned alike (`aligned` false): then no common
/// `head` exists.
template <typename T>
struct Row {
  static constexpr int V = vector_size<T>;
  int64_t offset;  // of the row's first element in the tensor
  int64_t size;
  int head;
  bool aligned;

  __device__ __forceinline__ Row(const T* tensor, int64_t offset, int64_t size, bool aligned)
      : offset(offset),
        size(size),
        head(aligned ? int(reinterpret_cast<uintptr_t>(tensor + offset) % 16 / sizeof(T)) : 0),
        aligned(aligned) {}

  __device__ __forceinline__ int64_t packs() const { return (size + head + V - 1) / V; }

  __device__ __forceinline__ Span<T> span(int64_t pack) const {
    const int64_t first = pack * V - head;
    const int begin = first < 0 ? head : 0;
    const int end = first + V > size ? int(size - first) : V;
    return {offset + first, begin, end, aligned && end - begin == V};
  }
};

}  // namespace limpq::cuda
