"""Which tensors a network holds between its layers, how long, and which of them layers share.

From the calls of a forward in their order, without torch: values are numbers.

Moments are the calls of quantizable layers, counted from 0. The rules:

- A layer call puts out a new tensor, held from its moment on. The network's inputs are held from
  moment 0.
- A function works in place on an input of its output's size that nothing needs afterwards: a
  convolution with the normalisation and activation after it is one tensor, and so is what an
  addition puts out with the one of its inputs that came last; the other input, a skip connection,
  is held up to there. Where an input is still needed, the output is a tensor of its own, held from
  the last layer call before it on.
- What only moves values makes no tensor: views, permutations, parts, concatenations, padding. The
  output of a concatenation is its inputs, and a part of a tensor holds the whole of it.
- A tensor is stored with the activation bits of the first layer that reads its values, moved or
  not, or their maxima: quantization and maximum can change places. Where no layer reads them, it
  is float: a residual stream that every reader normalises for itself, a product of attention, the
  network's outputs, which are held to the end.
- What depends on no input, such as a position embedding, is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from limpq_ext.values.costs import LiveTensor


class Kind(Enum):
    """What a call does with the values it is given."""

    LAYER = auto()
    """A quantizable layer: reads them and puts out a new tensor."""
    SAME = auto()
    """All values of one tensor, in another shape or order."""
    MOVE = auto()
    """Some of the values, or those of several tensors."""
    MAXIMUM = auto()
    """Maxima of the values: a new tensor, whose quantized values are maxima of quantized ones."""
    ELEMENTWISE = auto()
    """Computes new values, in place where it can."""
    SUM = auto()
    """The same, of several tensors that are added."""
    COMPUTE = auto()
    """Computes new values from many, not in place."""


@dataclass
class _Tensor:
    """A tensor while its time is found."""

    elements: int
    first: int
    last: int
    layer: str | None = None
    maxima: list[_Tensor] = field(default_factory=list)

    def reader(self) -> str | None:
        return next(filter(None, (self.layer, *(tensor.reader() for tensor in self.maxima))), None)


@dataclass(frozen=True)
class _Call:
    kind: Kind
    inputs: tuple[int, ...]
    output: int
    layer: str | None


class Flow:
    """Records the calls of one forward."""

    def __init__(self) -> None:
        self._elements: list[int] = []
        self._given: list[int] = []
        self._calls: list[_Call] = []
        self._outputs: tuple[int, ...] = ()

    def add_input(self, elements: int, *, held: bool = True) -> int:
        """An input of the network; ``held=False``: a constant, which is not counted.

        Returns:
            The value's number.
        """
        value = self._new(elements)
        if held:
            self._given.append(value)
        return value

    def add_call(
        self, kind: Kind, inputs: Sequence[int], elements: int, layer: str | None = None
    ) -> int:
        """A call that reads values and puts out one; a layer's has its name.

        Returns:
            The number of the value that it puts out.
        """
        output = self._new(elements)
        self._calls.append(_Call(kind, tuple(dict.fromkeys(inputs)), output, layer))
        return output

    def elements(self, value: int) -> int:
        """How many elements a value has."""
        return self._elements[value]

    def set_outputs(self, values: Sequence[int]) -> None:
        """What the network puts out."""
        self._outputs = tuple(values)

    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that read one and the same tensor, also in another shape."""
        origin = list(range(len(self._elements)))
        readers: dict[int, dict[str, None]] = {}
        for call in self._calls:
            if call.kind is Kind.SAME:
                origin[call.output] = origin[call.inputs[0]]
            elif call.layer is not None:
                for value in call.inputs:
                    readers.setdefault(origin[value], {})[call.layer] = None
        groups = dict.fromkeys(tuple(group) for group in readers.values() if len(group) > 1)
        return tuple(groups)

    def added_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that read the operands of one addition, or what it puts out."""
        _, additions = self._followed()
        readers = [dict.fromkeys(tensor.reader() for tensor in added) for added in additions]
        groups = [tuple(name for name in own if name is not None) for own in readers]
        return tuple(dict.fromkeys(group for group in groups if len(group) > 1))

    def tensors(self) -> tuple[LiveTensor, ...]:
        """The tensors that are held between the layers, in the order in which they appear."""
        tensors, _ = self._followed()
        return tuple(LiveTensor(t.elements, t.reader(), t.first, t.last) for t in tensors)

    def _followed(self) -> tuple[list[_Tensor], list[tuple[_Tensor, ...]]]:
        """All tensors, and those of each addition: its operands and what it puts out."""
        last_use = self._last_uses()
        tensors: list[_Tensor] = []
        additions: list[tuple[_Tensor, ...]] = []
        parts: dict[int, tuple[_Tensor, ...]] = {}

        def new(value: int, moment: int) -> _Tensor:
            tensors.append(_Tensor(self._elements[value], moment, moment))
            parts[value] = (tensors[-1],)
            return tensors[-1]

        for value in self._given:
            new(value, 0)
        calls_done = 0
        for place, call in enumerate(self._calls):
            read = {
                id(tensor): tensor for value in call.inputs for tensor in parts.get(value, ())
            }.values()
            if call.kind is Kind.LAYER:
                calls_done += 1
            moment = max(0, calls_done - 1)
            for tensor in read:
                tensor.last = max(tensor.last, moment)
            if call.kind is Kind.LAYER:
                for tensor in read:
                    tensor.layer = tensor.layer or call.layer
                new(call.output, moment)
            elif not read:
                continue
            elif call.kind in (Kind.SAME, Kind.MOVE):
                parts[call.output] = tuple(read)
            else:
                ending = [
                    value
                    for value in call.inputs
                    if value in parts
                    and last_use[value] == place
                    and self._elements[value] == self._elements[call.output]
                ]
                if call.kind in (Kind.ELEMENTWISE, Kind.SUM) and ending:
                    latest = max(ending, key=lambda value: max(t.first for t in parts[value]))
                    parts[call.output] = parts[latest]
                else:
                    made = new(call.output, moment)
                    if call.kind is Kind.MAXIMUM:
                        for tensor in read:
                            tensor.maxima.append(made)
                if call.kind is Kind.SUM and len(read) > 1:
                    additions.append((*read, *parts[call.output]))
        for value in self._outputs:
            for tensor in parts.get(value, ()):
                tensor.last = max(0, calls_done - 1)
        return tensors, additions

    def _new(self, elements: int) -> int:
        self._elements.append(elements)
        return len(self._elements) - 1

    def _last_uses(self) -> list[int]:
        """For each value the last call that reads its memory, under any name."""
        memory = list(range(len(self._elements)))

        def root(value: int) -> int:
            while memory[value] != value:
                memory[value] = memory[memory[value]]
                value = memory[value]
            return value

        moves = (call for call in self._calls if call.kind in (Kind.SAME, Kind.MOVE))
        for call in moves:
            for value in call.inputs:
                memory[root(value)] = root(call.output)
        last = [-1] * len(self._elements)
        for place, call in enumerate(self._calls):
            for value in call.inputs:
                last[root(value)] = place
        for value in self._outputs:
            last[root(value)] = len(self._calls)
        return [last[root(value)] for value in range(len(memory))]
