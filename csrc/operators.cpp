// The library that is always built: the schemas of all operators, their CPU kernels, and how it was
// built.
#include "operators.h"

#include "cpu/fake_quantize.h"

namespace limpq {
namespace {

struct Cpu {
  static constexpr bool uses_host_memory = true;

  static void run(int64_t tasks, int64_t grain, cpu::TaskRange body, const void* context) {
    if (tasks <= grain) return body(context, 0, tasks);
    torch::stable::parallel_for(0, tasks, grain,
                                [=](int64_t begin, int64_t end) { body(context, begin, end); });
  }

  static void run_forward(const ForwardProblem* problems, int64_t count, const Tensor&) {
    cpu::fake_quantize_forward(problems, count, run);
  }

  static void run_backward(BackwardProblem* problems, int64_t count, const Tensor&) {
    cpu::fake_quantize_backward(problems, count, run);
  }

  static int64_t workspace_bytes(const BackwardProblem& problem) {
    return cpu::backward_workspace_bytes(problem);
  }

  static void run_error_sums(const ErrorSumsProblem& problem, const Tensor&) {
    cpu::error_sums(problem, run);
  }

  static int64_t workspace_bytes(const ErrorSumsProblem& problem) {
    return cpu::error_sums_workspace_bytes(problem);
  }
};

/// "key: value" lines.
std::string build_info() {
  return "compiler: " __VERSION__
         "\n"
         "flags: " LIMPQ_BUILD_FLAGS
         "\n"
         "built with torch: " LIMPQ_TORCH_VERSION
         "\n"
         "cpu capability: " +
         cpu::capability();
}

}  // namespace

// The namespace is the package's name: who meets one of these operators in a file that
// torch.export saved reads there what to import.
STABLE_TORCH_LIBRARY(limpq_ext, m) {
#define LIMPQ_RANGES                                                               \
  "int[] quant_mins, int[] quant_maxs, int? channel_axis, float[]? grad_factors, " \
  "float scale_min, float scale_max, float? relu_max=None"
#define LIMPQ_LIST "int[] scale_rows, " LIMPQ_RANGES ", bool stacked=True)"
#define LIMPQ_BANK                                                         \
  "int[] counts, int[] quant_mins, int[] quant_maxs, int[] channel_axes, " \
  "float[] scale_mins, float[] scale_maxs)"
  m.def("fake_quantize(Tensor x, Tensor scale, " LIMPQ_LIST " -> Tensor");
  m.def("fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, " LIMPQ_LIST
        " -> (Tensor, Tensor)");
  m.def("fake_quantize_selected(Tensor x, Tensor scale, Tensor selected, " LIMPQ_RANGES
        ") -> Tensor");
  m.def(
      "fake_quantize_selected_backward(Tensor grad, Tensor x, Tensor scale, Tensor "
      "selected, " LIMPQ_RANGES ") -> (Tensor, Tensor)");
  m.def("bank_forward(Tensor[] weights, Tensor[] scales, Tensor(a!)[] outputs, " LIMPQ_BANK
        " -> ()");
  m.def("bank_backward(Tensor[] grads, int[] places, Tensor[] weights, Tensor[] scales, " LIMPQ_BANK
        " -> (Tensor[], Tensor[])");
  m.def(
      "quantization_error_sums(Tensor x, Tensor grad, Tensor scale, int[] quant_mins, "
      "int[] quant_maxs, int? channel_axis, int? sum_axis, float scale_min, float scale_max, "
      "float? relu_max=None) -> Tensor");
  m.def("build_info() -> str");
#undef LIMPQ_RANGES
#undef LIMPQ_LIST
#undef LIMPQ_BANK
}

STABLE_TORCH_LIBRARY_IMPL(limpq_ext, CPU, m) {
  Operators<Cpu>::register_all(m);
}

STABLE_TORCH_LIBRARY_IMPL(limpq_ext, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace limpq
