// The weight bank: the weights of all layers at all their bit-widths in one call forward and one
// backward. It is no autograd function: a trainer calls forward, uses the outputs as leaves in as
// many passes as it likes, and calls backward once (limpq_ext/bank.py).
#include <ATen/Functions.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "problems.h"

namespace limpq {
namespace {

using at::Tensor;

/// The table of problems, built once. Pointers into the tensors are kept: is_current() says whether
/// they still hold, and forward and backward check it.
class WeightBank : public torch::CustomClassHolder {
 public:
  /// Adds a layer: `outputs` has a tensor for each bit-width, laid out in memory as `weight` is.
  /// Scale row k belongs to bit-width k.
  void add(const std::string& name, const Tensor& weight, const Tensor& scale,
           const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs,
           std::optional<int64_t> channel_axis, const std::vector<double>& grad_factors,
           double scale_min, double scale_max, const std::vector<Tensor>& outputs) {
    std::vector<int64_t> scale_rows(quant_mins.size());
    for (size_t k = 0; k < scale_rows.size(); ++k) scale_rows[k] = int64_t(k);
    const Quantization how = {scale_rows,   quant_mins, quant_maxs, grad_factors,
                              channel_axis, scale_min,  scale_max};
    check_arguments(weight, scale, how);
    check_bit_widths(how);
    TORCH_CHECK_VALUE(can_run_on(weight.device()), "weight bank: ", name, " is on ",
                      weight.device(), ", for which this build of limpq_ext has no kernels");
    TORCH_CHECK_VALUE(weight.is_non_overlapping_and_dense(), "weight bank: ", name,
                      ": the weight's memory has gaps or overlaps, strides ", weight.strides());
    TORCH_CHECK_VALUE(layers_.empty() || layers_[0].weight.device() == weight.device(),
                      "weight bank: ", name, " is on ", weight.device(), ", other layers are on ",
                      layers_.empty() ? weight.device() : layers_[0].weight.device());
    TORCH_CHECK_VALUE(outputs.size() == quant_mins.size(), "weight bank: ", name, ": ",
                      outputs.size(), " outputs for ", quant_mins.size(), " bit-widths");
    ForwardProblem problem;
    Layer layer{name, weight, scale, compute_scale_of(scale, weight), outputs, grad_factors};
    describe(problem, weight, layer.compute_scale, how);
    for (size_t k = 0; k < outputs.size(); ++k) {
      TORCH_CHECK_VALUE(outputs[k].sizes() == weight.sizes() &&
                            outputs[k].strides() == weight.strides() &&
                            outputs[k].scalar_type() == weight.scalar_type() &&
                            outputs[k].device() == weight.device(),
                        "weight bank: ", name, ": output ", k, " is not laid out as the weight is");
      problem.y[k] = outputs[k].mutable_data_ptr();
    }
    layer.scale_data = scale.const_data_ptr();
    layer.sizes = weight.sizes().vec();
    layer.strides = weight.strides().vec();
    layers_.push_back(std::move(layer));
    problems_.push_back(problem);
  }

  /// Whether every weight and scale still has the memory that it had when it was added.
  bool is_current() const {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      if (layer.weight.const_data_ptr() != problems_[i].x || layer.weight.sizes() != layer.sizes ||
          layer.weight.strides() != layer.strides ||
          layer.scale.const_data_ptr() != layer.scale_data) {
        return false;
      }
    }
    return true;
  }

  /// Fills the outputs.
  void forward() {
    if (layers_.empty()) return;
    check_current();
    for (Layer& layer : layers_) {
      // A copy in the compute type, for half and double models.
      if (layer.has_own_compute_scale()) layer.compute_scale.copy_(layer.scale.detach());
      layer.weight_version = layer.weight._version();
      layer.scale_version = layer.scale._version();
      // A pass that still needs the former values then says so instead of using the new ones.
      for (const Tensor& output : layer.outputs) output.unsafeGetTensorImpl()->bump_version();
    }
    run_forward(problems_.data(), int64_t(problems_.size()), layers_[0].weight);
  }

  /// The gradients of the weights and of the scales, of each layer in the order of add(). `grads`
  /// has an entry for each layer and bit-width; an absent one is not read, and a layer whose
  /// gradients are all absent gets none.
  std::tuple<std::vector<std::optional<Tensor>>, std::vector<std::optional<Tensor>>> backward(
      const std::vector<std::optional<Tensor>>& grads) {
    check_current();
    size_t expected = 0;
    for (const ForwardProblem& problem : problems_) expected += problem.count;
    TORCH_CHECK_VALUE(grads.size() == expected, "weight bank: ", grads.size(), " gradients for ",
                      expected, " quantized weights");
    std::vector<std::optional<Tensor>> dweights(layers_.size()), dscales(layers_.size());
    std::vector<BackwardProblem> problems;
    std::vector<Tensor> keep_alive;
    size_t first = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      BackwardProblem problem;
      static_cast<Problem&>(problem) = problems_[i];
      bool any = false;
      for (int k = 0; k < problem.count; ++k) {
        const std::optional<Tensor>& grad = grads[first + k];
        problem.grad[k] = nullptr;
        problem.grad_factor[k] = layer.grad_factors[k];
        if (!grad || !grad->defined()) continue;
        keep_alive.push_back(gradient_for(layer.weight, *grad));
        problem.grad[k] = keep_alive.back().const_data_ptr();
        any = true;
      }
      first += problem.count;
      if (!any) continue;
      TORCH_CHECK(layer.weight._version() == layer.weight_version &&
                      layer.scale._version() == layer.scale_version,
                  "weight bank: ", layer.name,
                  ": the weight or its scales were modified between quantize() and backward()");
      dweights[i] = at::empty_strided(layer.sizes, layer.strides, layer.weight.options());
      dscales[i] = at::empty_like(layer.compute_scale);
      problem.dx = dweights[i]->mutable_data_ptr();
      problem.dscale = dscales[i]->mutable_data_ptr();
      problem.adds_to_dscale = false;
      problems.push_back(problem);
    }
    if (!problems.empty()) {
      run_backward(problems.data(), int64_t(problems.size()), layers_[0].weight);
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
      if (dscales[i]) dscales[i] = dscales[i]->to(layers_[i].scale.scalar_type());
    }
    return {std::move(dweights), std::move(dscales)};
  }

 private:
  struct Layer {
    std::string name;
    Tensor weight;
    Tensor scale;
    Tensor compute_scale;  // `scale` itself where it has the compute type
    std::vector<Tensor> outputs;
    std::vector<double> grad_factors;
    const void* scale_data = nullptr;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t weight_version = 0;  // when the outputs were filled
    int64_t scale_version = 0;

    bool has_own_compute_scale() const { return !compute_scale.is_same(scale); }
  };

  void check_current() const {
    TORCH_CHECK(is_current(),
                "weight bank: the memory of a weight or scale was replaced; quantize() again");
  }

  std::vector<Layer> layers_;
  // Of layers_, in the same order. On CUDA each call fills its kernel's parameters from them: some
  // 4 us for the 52 layers of a ResNet-50 forward and 20 us backward, where a parameter table kept
  // here would need the new addresses of all gradients just the same.
  std::vector<ForwardProblem> problems_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(limpq, m) {
  m.class_<WeightBank>("WeightBank")
      .def(torch::init<>())
      .def("add", &WeightBank::add)
      .def("is_current", &WeightBank::is_current)
      .def("forward", &WeightBank::forward)
      .def("backward", &WeightBank::backward);
}

}  // namespace limpq
