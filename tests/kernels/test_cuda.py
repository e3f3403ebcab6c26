"""What only a GPU can show: streams, graphs, devices, memory, and the same bits as the CPU."""

import gc
import math
from contextlib import contextmanager

import pytest
import torch
from test_bank import every, parameters, quantized_alone, small_layers
from test_ops import DTYPES, assert_same_bits, chain, compute_dtype

from limpq_ext import (
    ActivationQuantizer,
    WeightBank,
    lsq_fake_quantize,
    lsq_fake_quantize_multi,
    quantization_error_sums,
)
from limpq_ext.kernels.ops import fake_quantize_selected

pytestmark = pytest.mark.cuda

LOWS, HIGHS = (-2, -8, 0), (1, 7, 255)
FUNCTIONS = {
    "single": lambda x, scales, axis: lsq_fake_quantize(x, scales[1], -8, 7, channel_axis=axis),
    "selected": lambda x, scales, axis: fake_quantize_selected(
        x, scales, x.new_ones((), dtype=torch.int64), (LOWS, HIGHS, axis, None, 1e-5, math.inf)
    ),
    "multi": lambda x, scales, axis: lsq_fake_quantize_multi(
        x, scales, LOWS, HIGHS, channel_axis=axis
    ),
}
# Shapes whose sums span many blocks; with an axis, rows of a channel and columns of channels.
LAYOUTS = {
    "one scale": ((6, 40, 31, 33), None),
    "rows": ((6, 40, 31, 33), 1),
    "columns": ((3000, 96), 1),
}

EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


class Call:
    """A function with its input, scales and gradient on the current device."""

    def __init__(self, function, layout, seed=0, device="cuda"):
        torch.manual_seed(seed)
        shape, self.axis = LAYOUTS[layout]
        self.function = FUNCTIONS[function]
        rows = (3,) if self.axis is None else (3, shape[self.axis])
        self.x = torch.randn(shape).to(device).requires_grad_()
        self.scales = (torch.rand(rows) * 0.2 + 0.05).to(device).requires_grad_()
        self.grad = torch.randn((3, *shape) if function == "multi" else shape).to(device)

    def __call__(self):
        """Output and both gradients."""
        y = self.function(self.x, self.scales, self.axis)
        return [y.detach(), *torch.autograd.grad(y, (self.x, self.scales), self.grad)]

    @torch.no_grad()
    def renew(self):
        """New contents in the same memory."""
        self.x.normal_()
        self.grad.normal_()
        self.scales.uniform_(0.05, 0.25)


def assert_all_equal(ours, expected):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert_same_bits(one, other)


def capture(run):
    """A graph of run(), and the tensors that every replay fills."""
    run()  # what happens once only: kernels are loaded, buffers allocated
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


# --- graphs -------------------------------------------------------------------------------------


@EVERY_FUNCTION
@EVERY_LAYOUT
def test_a_graph_replays_with_new_contents(function, layout):
    call = Call(function, layout)
    graph, outputs = capture(call)
    for _ in range(4):
        call.renew()
        graph.replay()
        assert_all_equal(outputs, call())


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_graph_of_the_bank_replays_with_new_contents(per_channel):
    with torch.device("cuda"):
        layers = small_layers(per_channel_weights=per_channel)
    bank = WeightBank(layers)
    bank.quantize()
    grads = {key: torch.randn_like(bank.weight(*key)) for key in every(layers)}

    def round_trip():
        for parameter in parameters(layers).values():
            parameter.grad = None
        bank.quantize()
        for key, grad in grads.items():
            bank.weight(*key).grad = grad
        bank.backward()
        return [parameter.grad for parameter in parameters(layers).values()]

    graph, outputs = capture(round_trip)
    for _ in range(3):
        with torch.no_grad():
            for parameter in parameters(layers).values():
                parameter.mul_(1.1)
            for grad in grads.values():
                grad.normal_()
        graph.replay()
        for name, bits in every(layers):
            alone = quantized_alone(layers[name], bits)
            assert_same_bits(bank.weight(name, bits).detach(), alone.detach())
        assert_all_equal(outputs, round_trip())


@EVERY_FUNCTION
@EVERY_LAYOUT
def test_a_graph_is_replayed_beside_eager_calls(function, layout):
    captured, eager = Call(function, layout, seed=0), Call(function, layout, seed=1)
    expected = captured(), eager()
    graph, outputs = capture(captured)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
        results.append(eager())
    torch.cuda.synchronize()
    assert_all_equal(outputs, expected[0])
    for result in results:
        assert_all_equal(result, expected[1])


@EVERY_FUNCTION
@EVERY_LAYOUT
def test_two_graphs_are_replayed_at_the_same_time(function, layout):
    calls = [Call(function, layout, seed=seed) for seed in (0, 1)]
    expected = [call() for call in calls]
    graphs, outputs = zip(*[capture(call) for call in calls], strict=True)
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for filled, wanted in zip(outputs, expected, strict=True):
        assert_all_equal(filled, wanted)


# --- streams and devices ------------------------------------------------------------------------


@EVERY_FUNCTION
@EVERY_LAYOUT
def test_two_streams_at_the_same_time_give_what_they_give_in_turn(function, layout):
    calls = [Call(function, layout, seed=seed) for seed in (0, 1)]
    expected = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for stream, call, kept in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(call())
    torch.cuda.synchronize()
    for kept, wanted in zip(results, expected, strict=True):
        for result in kept:
            assert_all_equal(result, wanted)


@EVERY_FUNCTION
def test_a_tensor_of_another_device_is_quantized_there(function):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device here, this needs two")
    here, there = (Call(function, "rows", device=f"cuda:{index}") for index in (0, 1))
    with torch.cuda.device(0):
        ours, expected = there(), here()
        assert torch.cuda.current_device() == 0
    assert {str(tensor.device) for tensor in ours} == {"cuda:1"}
    assert_all_equal([tensor.to("cuda:0") for tensor in ours], expected)


# --- waiting, launches and memory ---------------------------------------------------------------


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_FUNCTION
@EVERY_LAYOUT
def test_no_call_waits_for_the_device(function, layout):
    call = Call(function, layout)
    call()
    with waiting_is_an_error():
        call()


def test_no_quantizer_and_no_bank_waits_for_the_device():
    with torch.device("cuda"):
        quantizer, x = ActivationQuantizer((3, 6)).train(), torch.randn(1000, requires_grad=True)
        layers = small_layers()
    quantizer(x)  # the first batch does wait: its range decides the sign and the start value
    bank = WeightBank(layers)
    grad = torch.randn_like(layers["conv"].weight)
    with waiting_is_an_error():
        quantizer(x).sum().backward()
        for _ in range(2):
            bank.quantize()
            bank.weight("conv", 4).grad = grad
            bank.backward()


def test_the_check_for_waiting_sees_one_that_waits():
    x = torch.ones(3, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_forward_and_backward_are_one_launch_each(layout, count):
    call = Call("multi", layout)
    x, scales = call.x.detach(), call.scales.detach()
    how = (LOWS[:count], HIGHS[:count], call.axis, [1.0] * count, 1e-5, math.inf)
    rows, scales, grad = list(range(count)), scales[:count], call.grad[:count]
    forward = (torch.ops.limpq_ext.fake_quantize, x, scales, rows, *how)
    backward = (torch.ops.limpq_ext.fake_quantize_backward, grad, x, scales, rows, *how)
    for operator, *arguments in (forward, backward):
        operator(*arguments)
        torch.cuda.synchronize()
        with torch.profiler.profile(acc_events=True) as told:
            operator(*arguments)
            torch.cuda.synchronize()
        on_device = [
            event.name
            for event in told.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and "Sync" not in event.name
        ]
        if not on_device:
            pytest.skip("the profiler sees no kernels here (CUPTI is missing or not permitted)")
        assert len(on_device) == 1, on_device
        assert "limpq" in on_device[0]


@EVERY_FUNCTION
@EVERY_LAYOUT
def test_memory_comes_from_torchs_allocator_and_goes_back_to_it(function, layout):
    call = Call(function, layout)

    def kept_and_taken():
        """Bytes that torch and the driver say are more in use after ten calls."""
        torch.cuda.empty_cache()
        reserved, free = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
        results = [call() for _ in range(10)]
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved() - reserved
        taken = free - torch.cuda.mem_get_info()[0]
        return results, reserved, taken

    kept_and_taken()
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    # Another process may take or give back memory meanwhile, so not every try has to agree.
    tries = [kept_and_taken()[1:] for _ in range(3)]
    assert any(reserved == taken for reserved, taken in tries), tries
    assert torch.cuda.memory_allocated() == allocated


# --- sizes --------------------------------------------------------------------------------------

LARGE = {
    "one scale": ((2**31 + 4099,), None),
    "rows": ((3, 2**30 + 5), 0),
    "columns": ((2**19 + 3, 4099), 1),
}


@pytest.mark.parametrize("layout", LARGE)
def test_more_than_2_to_the_31_elements(layout):
    shape, axis = LARGE[layout]
    count = math.prod(shape)
    assert count > 2**31
    gc.collect()
    torch.cuda.empty_cache()
    # x, its gradient, y and dx in bfloat16, and the chain for a piece at a time
    needed, free = 4 * 2 * count + 3 * 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed} bytes of free GPU memory, there are {free}")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    grad = torch.empty_like(x).normal_()
    rows = () if axis is None else (shape[axis],)
    scale = (torch.rand(rows, device="cuda") * 0.2 + 0.1).requires_grad_()
    y = lsq_fake_quantize(x, scale, -8, 7, channel_axis=axis, grad_factor=1.0)
    dx, dscale = torch.autograd.grad(y, (x, scale), grad)
    y, x = y.detach(), x.detach()
    total = torch.zeros(rows, dtype=torch.float64, device="cuda")
    size = torch.zeros_like(total)
    with torch.no_grad():
        for part in pieces(shape):
            v, q, expected = chain(x[part], own_scales(scale, axis, part), -8, 7, axis)
            inside = (v >= -8) & (v <= 7)
            assert_same_bits(y[part], expected)
            assert_same_bits(dx[part], torch.where(inside, grad[part], torch.zeros_like(expected)))
            terms = grad[part].double() * torch.where(inside, q.double() - v.double(), q.double())
            own_scales(total, axis, part).add_(over_the_rest(terms, axis))
            own_scales(size, axis, part).add_(over_the_rest(terms.abs(), axis))
    assert bool(((dscale.double() - total).abs() <= 1e-5 * size).all())


def pieces(shape, elements=2**24):
    """Slices that cut a tensor along its first or, where that is short, its last axis."""
    if len(shape) == 2 and shape[1] > elements:
        for row in range(shape[0]):
            for start in range(0, shape[1], elements):
                yield slice(row, row + 1), slice(start, start + elements)
        return
    step = elements // math.prod(shape[1:])
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)


def own_scales(scales, axis, part):
    """The scales, or sums, of the channels that a piece has."""
    return scales[part[axis]] if axis is not None and axis < len(part) else scales


def over_the_rest(terms, axis):
    return terms.sum() if axis is None else terms.sum([d for d in range(terms.dim()) if d != axis])


# --- the CPU ------------------------------------------------------------------------------------

SMALL = {
    "one scale": ((6, 5, 7, 9), None, torch.contiguous_format),
    "many blocks": ((3, 20_001), None, torch.contiguous_format),
    "rows": ((6, 5, 7, 9), 1, torch.contiguous_format),
    "columns": ((6, 5, 7, 9), 1, torch.channels_last),
    "wide columns": ((300, 64), 1, torch.contiguous_format),
}


def special(shape, dtype):
    """Random values with zeros, infinities, NaN, denormals and ties among them."""
    x = torch.randn(shape, dtype=torch.float64)
    tiny = torch.finfo(dtype).smallest_normal
    few = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny / 4, -tiny / 4, 0.125, -0.375, 1e4]
    x.view(-1)[: 3 * len(few) : 3] = torch.tensor(few, dtype=torch.float64)
    return x.to(dtype)


@pytest.mark.sanitizer
@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SMALL)
def test_the_cpu_and_cuda_give_the_same_bits(function, dtype, layout):
    torch.manual_seed(0)
    shape, axis, memory_format = SMALL[layout]
    x = special(shape, dtype).contiguous(memory_format=memory_format)
    rows = (3,) if axis is None else (3, shape[axis])
    scales = torch.rand(rows, dtype=compute_dtype(dtype)) * 0.2 + 0.05
    scales.view(-1)[0] = 0.25
    grad = torch.randn((3, *shape) if function == "multi" else shape).to(dtype)

    def outcome(device):
        leaf, s = x.to(device).requires_grad_(), scales.to(device).requires_grad_()
        y = FUNCTIONS[function](leaf, s, axis)
        dx, _ = torch.autograd.grad(y, (leaf, s), grad.to(device))
        finite = leaf.detach().cpu().nan_to_num(0.0, 0.0, 0.0).to(device)
        finite = finite.contiguous(memory_format=memory_format).requires_grad_()
        sums = FUNCTIONS[function](finite, s, axis)
        (dscale,) = torch.autograd.grad(sums, s, grad.to(device))
        return y.detach().cpu(), dx.cpu(), dscale.cpu()

    (y, dx, dscale), (cpu_y, cpu_dx, cpu_dscale) = outcome("cuda"), outcome("cpu")
    # Where quant_min is 0, -0.0 becomes +0.0 on CUDA and stays on the CPU, as in torch.clamp.
    if function == "multi":
        cpu_y[2] += 0.0
    assert_same_bits(y, cpu_y)
    assert_same_bits(dx, cpu_dx)
    torch.testing.assert_close(dscale, cpu_dscale, rtol=1e-4, atol=1e-4 * float(x.numel()) ** 0.5)


@pytest.mark.sanitizer
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_bank_on_the_cpu_and_on_cuda_give_the_same_bits(per_channel):
    results = []
    torch.manual_seed(0)
    on_cpu = small_layers(per_channel_weights=per_channel)
    grads = {key: torch.randn(on_cpu[key[0]].weight.shape) for key in every(on_cpu)}
    for device in ("cpu", "cuda"):
        layers = {name: layer.to(device) for name, layer in on_cpu.items()}
        bank = WeightBank(layers)
        bank.quantize()
        for key, grad in grads.items():
            bank.weight(*key).grad = grad.to(device)
        bank.backward()
        weights = [bank.weight(*key).detach().cpu() for key in every(layers)]
        weights += [layer.weight.grad.cpu() for layer in layers.values()]
        scales = [layer.weight_quantizer.scale.grad.cpu() for layer in layers.values()]
        results.append((weights, scales))
        for parameter in parameters(layers).values():
            parameter.grad = None
    (cpu_weights, cpu_scales), (weights, scales) = results
    assert_all_equal(weights, cpu_weights)
    for ours, expected in zip(scales, cpu_scales, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def error_sums(x, grad, scales, axis, sum_axis):
    lows, highs = ((-2, -8, 0), (1, 7, 255))
    return quantization_error_sums(
        x, grad, scales, lows, highs, channel_axis=axis, sum_axis=sum_axis
    )


def error_sums_inputs(layout, dtype):
    """What the sums are of, on the CPU, and for which axes."""
    torch.manual_seed(0)
    shape, axis, memory_format = SMALL[layout]
    x, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in "xg")
    rows = (3,) if axis is None else (3, shape[axis])
    scales = torch.rand(rows, dtype=compute_dtype(dtype)) * 0.2 + 0.05
    return x, grad, scales, axis


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("whole", [False, True])
def test_error_sums_on_the_cpu_and_on_cuda_agree(dtype, layout, whole):
    *tensors, axis = error_sums_inputs(layout, dtype)
    by = None if whole else 0 if axis is None else axis
    expected = error_sums(*tensors, axis, by)
    on_cuda = [tensor.cuda() for tensor in tensors]
    found = error_sums(*on_cuda, axis, by)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * tensors[0].numel() ** 0.5}
    for ours, theirs, again in zip(found, expected, error_sums(*on_cuda, axis, by), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **tolerance)
        assert_same_bits(again, ours)


@pytest.mark.parametrize("layout", SMALL)
def test_error_sums_do_not_wait_for_the_device_and_can_be_captured(layout):
    *tensors, axis = error_sums_inputs(layout, torch.float32)
    tensors = [tensor.cuda() for tensor in tensors]
    expected = error_sums(*tensors, axis, axis)
    with waiting_is_an_error():
        error_sums(*tensors, axis, axis)
    graph, captured = capture(lambda: error_sums(*tensors, axis, axis))
    for _ in range(2):
        graph.replay()
        assert_all_equal(captured, expected)
