// Fake quantization on CUDA: what the launchers in forward.cu, backward.cu and error_sums.cu offer.
// Neither torch nor CUDA headers are needed to include this.
//
// A list of problems is one kernel launch where it is homogeneous: of one data type, all per tensor
// or with channels that are rows of memory (or all with channels that are columns and of one
// alignment), as banks are. Otherwise it is one launch for each kind. A launch
// holds 148 problems of 5 bit-widths each forward and 96 backward, in float64 118 and 82; a longer
// list takes several.
//
// Launches are on `stream` of the current device. Nothing synchronises, nothing is allocated or
// copied to the device (the problems are in the kernels' parameters), and every call can be
// captured in a graph. A launch that fails raises std::runtime_error with CUDA's message.
#pragma once

#include <cstdint>

#include "../fake_quantize.h"

struct CUstream_st;  // cudaStream_t points to one

namespace limpq::cuda {

void fake_quantize_forward(const ForwardProblem* problems, int64_t count, CUstream_st* stream);

/// `counters`: backward_counter_bytes(problems, count) bytes, divisible by 4, all 0.
void fake_quantize_backward(const BackwardProblem* problems, int64_t count, void* counters,
                            CUstream_st* stream);

/// Bytes of BackwardProblem::workspace, which is scratch: its contents before and after mean
/// nothing. Of the problem's pointers only which gradients are null is looked at, here and below.
int64_t backward_workspace_bytes(const BackwardProblem& problem);

/// Bytes of the counters of a list, which are those of its problems one after the other: 0 where no
/// sum spans blocks (then the pointer may be null).
///
/// The block that arrives last finishes the sums; it knows that it is the last from a counter. The
/// counters must be 0 when the kernel starts, and the last block sets them back to 0, so zero them
/// once and use them for any number of calls, with any lists, as long as the calls are ordered:
///
/// - Eager calls: one buffer per device and stream. Kernels of one stream do not overlap.
/// - While a stream is captured: a buffer that belongs to this capture (and stream), zeroed by a
///   node of the graph itself, for example torch::zeros inside the capture. A stream's eager buffer
///   would be wrong here: the graph may be replayed on another stream beside eager calls, and two
///   graphs captured on one stream may be replayed at the same time.
///
/// They are not part of the workspace, which is uninitialised and would need a memset node before
/// every call; and not a static array with slots dealt out by the launcher, since a graph keeps the
/// slot of its capture for ever and so may meet any other call in it.
int64_t backward_counter_bytes(const BackwardProblem* problems, int64_t count);

/// `counters`: error_sums_counter_bytes(problem) bytes, as for backward. One launch; the problem is
/// not empty.
void error_sums(const ErrorSumsProblem& problem, void* counters, CUstream_st* stream);

/// Bytes of ErrorSumsProblem::workspace, and of the counters.
int64_t error_sums_workspace_bytes(const ErrorSumsProblem& problem);
int64_t error_sums_counter_bytes(const ErrorSumsProblem& problem);

/// Whether what is launched on the stream is being captured into a graph.
bool is_capturing(CUstream_st* stream);

}  // namespace limpq::cuda
