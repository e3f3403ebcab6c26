// The extension module: loading it registers the operators, and it tells how it was built.
#include <pybind11/pybind11.h>

#include "cpu/fake_quantize.h"

#if !defined(LIMPQ_CUDA_VERSION)
#define LIMPQ_CUDA_VERSION ""
#define LIMPQ_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of limpq_ext; the operators are in torch.ops.limpq.";
  m.def("cpu_capability", &limpq::cpu::capability,
        "The instruction set that the CPU kernels use here: 'avx512', 'avx2' or 'baseline'.");
  m.attr("compiler") = __VERSION__;
  m.attr("build_flags") = LIMPQ_BUILD_FLAGS;
  m.attr("cuda_version") = LIMPQ_CUDA_VERSION;
  m.attr("cuda_architectures") = LIMPQ_CUDA_ARCHITECTURES;
}
