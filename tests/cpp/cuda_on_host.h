// Runs CUDA kernels on the CPU, from their own source: one std::thread for each CUDA thread.
//
// Include this before a kernel's .cuh and compile with an ordinary C++ compiler. Slow, and right in
// what matters for tests: threads of a block and two blocks at a time really run concurrently, so
// the thread sanitizer sees a missing barrier, the address sanitizer an access out of bounds, and
// the undefined-behaviour sanitizer a misaligned vector access.
#pragma once

#include <pthread.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace cuda_on_host {

struct Index {
  unsigned x = 0;
};

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

/// The 32 threads of a warp, and what they shuffle.
struct Warp {
  Barrier barrier{32};
  double values[2][32] = {};  // in turn: slow threads may still read the other one
};

/// What the threads of one resident block share.
struct Multiprocessor {
  explicit Multiprocessor(int threads) : barrier(threads) {
    for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::atomic<int> votes[3] = {};
  std::unique_ptr<double[]> shared;  // of exactly the size asked for: the sanitizer watches its end
};

inline thread_local Multiprocessor* multiprocessor = nullptr;
inline thread_local unsigned vote = 0;
inline thread_local unsigned shuffle = 0;

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(multiprocessor->shared.get());
}

}  // namespace cuda_on_host

inline thread_local cuda_on_host::Index threadIdx;
inline thread_local cuda_on_host::Index blockIdx;
inline thread_local cuda_on_host::Index blockDim;

using std::max;
using std::min;

inline void __syncthreads() {
  cuda_on_host::multiprocessor->barrier.wait();
}

inline int __syncthreads_or(int predicate) {
  using namespace cuda_on_host;
  // Three in turn: one in use, one that slow threads may still read, one being cleared.
  std::atomic<int>& mine = multiprocessor->votes[vote % 3];
  if (threadIdx.x == 0) multiprocessor->votes[(vote + 1) % 3].store(0);
  ++vote;
  if (predicate) mine.store(1);
  __syncthreads();
  return mine.load();
}

inline double __shfl_xor_sync(unsigned, double value, int lane_mask) {
  cuda_on_host::Warp& warp = *cuda_on_host::multiprocessor->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  double (&values)[32] = warp.values[cuda_on_host::shuffle++ % 2];
  values[lane] = value;
  warp.barrier.wait();
  return values[lane ^ lane_mask];
}

/// Acquires and releases, which stands for the fences around it.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline void __threadfence() {}

inline double __ldcg(const double* address) {
  return *address;
}
inline void __stwb(uint4* address, uint4 value) {
  *address = value;
}

namespace cuda_on_host {

enum class BlockOrder { ascending, descending };

/// Threads that live as long as the tests and run blocks of one size, two at a time.
class Pool {
 public:
  static constexpr unsigned resident_blocks = 2;

  explicit Pool(int threads)
      : threads_(threads), start_(threads * resident_blocks + 1), end_(start_count()) {
    for (unsigned m = 0; m < resident_blocks; ++m) {
      multiprocessors_.push_back(std::make_unique<Multiprocessor>(threads));
    }
    for (unsigned m = 0; m < resident_blocks; ++m) {
      for (int t = 0; t < threads; ++t) {
        workers_.emplace_back([this, m, t] { work(m, t); });
      }
    }
  }

  ~Pool() {
    kernel_ = nullptr;
    start_.wait();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(std::function<void()> kernel, unsigned blocks, int shared_bytes, BlockOrder order) {
    kernel_ = std::move(kernel);
    blocks_ = blocks;
    order_ = order;
    for (auto& multiprocessor : multiprocessors_) {
      multiprocessor->shared = std::make_unique<double[]>((shared_bytes + 7) / 8);
    }
    start_.wait();
    end_.wait();
  }

 private:
  unsigned start_count() const { return threads_ * resident_blocks + 1; }

  void work(unsigned m, int t) {
    multiprocessor = multiprocessors_[m].get();
    threadIdx.x = t;
    blockDim.x = threads_;
    while (true) {
      start_.wait();
      if (!kernel_) return;
      for (unsigned i = m; i < blocks_; i += resident_blocks) {
        blockIdx.x = order_ == BlockOrder::ascending ? i : blocks_ - 1 - i;
        kernel_();
        multiprocessor->barrier.wait();
      }
      end_.wait();
    }
  }

  int threads_;
  Barrier start_;
  Barrier end_;
  std::vector<std::unique_ptr<Multiprocessor>> multiprocessors_;
  std::vector<std::thread> workers_;
  std::function<void()> kernel_;
  unsigned blocks_ = 0;
  BlockOrder order_ = BlockOrder::ascending;
};

/// What the kernels' dispatch takes for launching.
inline auto launcher(BlockOrder order = BlockOrder::ascending) {
  return
      [order](auto kernel, int64_t blocks, int threads, int shared_bytes, const auto& parameters) {
        static std::map<int, std::unique_ptr<Pool>> pools;
        std::unique_ptr<Pool>& pool = pools[threads];
        if (!pool) pool = std::make_unique<Pool>(threads);
        pool->run([&] { kernel(parameters); }, static_cast<unsigned>(blocks), shared_bytes, order);
      };
}

}  // namespace cuda_on_host
