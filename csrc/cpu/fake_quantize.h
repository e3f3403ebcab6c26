// Fake quantization on the CPU: the partition into tasks around the span kernels.
#pragma once

#include <cstdint>
#include <string>

#include "../fake_quantize.h"

namespace limpq::cpu {

/// Runs body(context, begin, end) over sub-ranges that cover 0 .. tasks, possibly at once on many
/// threads with at least `grain` tasks each: fewer are not worth a thread. Plain pointers: a
/// std::function would allocate memory in every call.
using TaskRange = void (*)(const void* context, int64_t begin, int64_t end);
using Parallel = void (*)(int64_t tasks, int64_t grain, TaskRange body, const void* context);

/// All problems of the list in one parallel region.
void fake_quantize_forward(const ForwardProblem* problems, int64_t count, Parallel parallel);
void fake_quantize_backward(const BackwardProblem* problems, int64_t count, Parallel parallel);
void error_sums(const ErrorSumsProblem& problem, Parallel parallel);

/// Size of BackwardProblem::workspace.
int64_t backward_workspace_bytes(const BackwardProblem& problem);
/// Size of ErrorSumsProblem::workspace.
int64_t error_sums_workspace_bytes(const ErrorSumsProblem& problem);

/// The instruction set in use: "avx512", "avx2" or "baseline". The best that the processor has, or
/// a lower one named by the environment variable LIMPQ_CPU_CAPABILITY. Read once.
const std::string& capability();

}  // namespace limpq::cpu
