// Fake quantization of one tensor on the CPU: the partition into tasks around the span kernels.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "../fake_quantize.h"

namespace limpq::cpu {

/// Runs body(begin, end) over sub-ranges that cover 0 .. tasks, possibly at once on many threads.
using Parallel =
    std::function<void(int64_t tasks, const std::function<void(int64_t, int64_t)>& body)>;

void fake_quantize_forward(const ForwardProblem& problem, const Parallel& parallel);
void fake_quantize_backward(const BackwardProblem& problem, const Parallel& parallel);

/// Size of BackwardProblem::workspace.
int64_t backward_workspace_bytes(const BackwardProblem& problem);

/// The instruction set in use: "avx512", "avx2" or "baseline". The best that the processor has, or
/// a lower one named by the environment variable LIMPQ_CPU_CAPABILITY. Read once.
const std::string& capability();

}  // namespace limpq::cpu
