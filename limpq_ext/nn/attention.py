"""Attention that reads its weights past their layers, replaced by attention that goes through them.

nn.MultiheadAttention multiplies by ``in_proj_weight`` itself, and torchvision's shifted windows are
handed ``self.qkv.weight``: a quantizer of such a layer would never be called. The modules here
compute the same through ordinary nn.Linear layers, share the parameters of what they replace, load
its state, and are of its class.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limpq_ext.nn.swapping import OfMadeClass, made_class, swap_modules, with_class
from limpq_ext.values.reading import first_line


class ProjectedAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose projections are layers.

    ``in_proj`` maps ``embed_dim`` to query, key and value where the module attends to itself. Where
    it attends to something else, as in nn.TransformerDecoderLayer, or with ``kdim`` or ``vdim``,
    there are ``q_proj``, ``k_proj`` and ``v_proj``. ``out_proj`` keeps its name.

    A state_dict of the float module loads; one that is saved has the names of the layers.
    """

    # nn.TransformerEncoderLayer looks at these to choose a kernel that takes the float weights.
    in_proj_weight = None  # type: ignore[assignment]
    in_proj_bias = None  # type: ignore[assignment]
    in_proj: nn.Linear
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    _PACKED: ClassVar = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}
    _PARTS: ClassVar = ("q_proj", "k_proj", "v_proj")

    @classmethod
    def from_float(cls, module: nn.MultiheadAttention, *, crossing: bool) -> ProjectedAttention:
        """A twin of ``module`` that shares its parameters, which are only cut where they must be.

        Args:
            module: Is left as it is.
            crossing: It attends to other tensors than its query.
        """
        twin = with_class(module, cls)
        own = {name: twin._parameters.pop(name, None) for name in (*cls._PACKED, *cls._separate())}
        if module._qkv_same_embed_dim and not crossing:
            twin.in_proj = _linear(own["in_proj_weight"], own["in_proj_bias"])
        else:
            packed, bias = own["in_proj_weight"], own["in_proj_bias"]
            weights = (
                [own[name] for name in cls._separate()]
                if packed is None
                else [_part(packed, row) for row in range(3)]
            )
            for row, (name, weight) in enumerate(zip(cls._PARTS, weights, strict=True)):
                setattr(twin, name, _linear(weight, None if bias is None else _part(bias, row)))
        return twin.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What nn.MultiheadAttention.forward computes; nested tensors are not taken.

        ``is_causal`` is a hint, as there: ``attn_mask`` is what counts.

        Raises:
            ValueError: Key or value is another tensor than the query, where the module has one
                projection for all; or ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is None")
        to_itself = query is key and key is value
        batched = query.dim() == 3
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        q, k, v = self._project(query, key, value, to_itself)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = _merged_mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
            if average_attn_weights:
                weights = weights.mean(dim=1)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, to_itself: bool
    ) -> tuple[Tensor, ...]:
        if "in_proj" not in self._modules:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not to_itself:
            raise ValueError(
                "its key or value is another tensor than its query, but it has one projection for"
                " the three; build it with kdim or vdim other than embed_dim, or exclude it"
            )
        return self.in_proj(query).chunk(3, dim=-1)

    @classmethod
    def _separate(cls) -> list[str]:
        return [f"{name}_weight" for name in cls._PARTS]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, packed in self._PACKED.items():
            value = state_dict.pop(prefix + name, None)
            if value is None:
                continue
            if "in_proj" in self._modules:
                state_dict[prefix + packed] = value
            else:
                kind = packed.removeprefix("in_proj.")
                for part, rows in zip(self._PARTS, value.chunk(3), strict=True):
                    state_dict[f"{prefix}{part}.{kind}"] = rows
        for name in self._separate():
            if prefix + name in state_dict:
                new = f"{prefix}{name.removesuffix('_weight')}.weight"
                state_dict[new] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _QueryAndValueBias(nn.Linear):
    """A linear layer to query, key and value that adds no bias to the key."""

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = self.bias.chunk(3)
        return F.linear(input, self.weight, torch.cat([query, torch.zeros_like(key), value]))


class ProjectedWindows(OfMadeClass):
    """torchvision's ShiftedWindowAttention, both versions, through its layers qkv and proj.

    Mixed into the class of the module that is replaced.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map ``[N, H, W, C]`` to the same shape."""
        height, width = x.shape[1:3]
        window = self.window_size
        padding = [-size % side for size, side in zip((height, width), window, strict=True)]
        x = F.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
        grid = [size // side for size, side in zip(x.shape[1:3], window, strict=True)]
        # A window as large as the image has nowhere to shift to.
        shift = [
            0 if side >= size else step
            for side, size, step in zip(window, x.shape[1:3], self.shift_size, strict=True)
        ]
        x = torch.roll(x, [-step for step in shift], (1, 2)) if any(shift) else x
        inside = window[0] * window[1]
        x = x.unflatten(1, (grid[0], window[0])).unflatten(3, (grid[1], window[1]))
        x = x.transpose(2, 3).reshape(-1, inside, x.shape[-1])

        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        logit_scale = getattr(self, "logit_scale", None)
        if logit_scale is None:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self.get_relative_position_bias()
        if any(shift):
            apart = _windows_apart(grid, window, shift, scores)
            scores = (scores.unflatten(0, (-1, len(apart))) + apart).flatten(0, 1)
        weights = F.dropout(scores.softmax(dim=-1), self.attention_dropout, self.training)
        x = self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = F.dropout(x, self.dropout, self.training)

        x = x.unflatten(1, tuple(window)).unflatten(0, (-1, *grid)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        x = torch.roll(x, shift, (1, 2)) if any(shift) else x
        return x[:, :height, :width].contiguous()


def with_layers(model: nn.Module, replaced: Callable[[str], bool]) -> nn.Module:
    """A model whose attention goes through layers, wherever it reads weights past them.

    Names stay, but for projections that had been no layers: see :class:`ProjectedAttention`.

    Args:
        model: Is left as it is.
        replaced: Whether to replace the attention of this name in ``named_modules()``.

    Returns:
        A copy of the modules that shares the parameters and buffers.

    Raises:
        ValueError: The model holds something that cannot be copied.
    """
    tensors = itertools.chain(model.parameters(), model.buffers(), _attributes(model))
    model = copied(model, {id(tensor): tensor for tensor in tensors})
    names = {module: name for name, module in model.named_modules()}
    crossing = {
        module.multihead_attn for module in names if isinstance(module, nn.TransformerDecoderLayer)
    }
    twins = {
        module: _through_layers(module, crossing=module in crossing)
        for module, name in names.items()
        if name and _reads_past_layers(module) and replaced(name)
    }
    swap_modules(model, twins)
    for module in model.modules():
        # Else they may hand the float weights of all their layers to one kernel.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def copied(model: nn.Module, kept: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model.

    Args:
        model: Is left as it is.
        kept: What to put in the place of objects, by their ids, instead of a copy.

    Raises:
        ValueError: The model holds something that cannot be copied.
    """
    # A tensor that was computed, as the former torch.nn.utils.weight_norm keeps one, has no copy.
    computed = (tensor for tensor in _attributes(model) if not tensor.is_leaf)
    memo = {id(tensor): tensor.detach().clone() for tensor in computed} | (kept or {})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a model's own parts raise
        raise ValueError(f"cannot copy {type(model).__name__}: {first_line(error)}") from error


def _attributes(model: nn.Module) -> list[Tensor]:
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, Tensor)]


def _reads_past_layers(module: nn.Module) -> bool:
    # What torch.jit compiled has none in its class.
    forward = getattr(type(module), "forward", None)
    return (
        forward is nn.MultiheadAttention.forward
        or getattr(module, "qkv_bias_separate", None) is False
        or forward in _forwards_of_windows()
    )


def _forwards_of_windows() -> tuple[Any, ...]:
    """The forwards of torchvision's shifted windows, where it was imported."""
    swin: Any = sys.modules.get("torchvision.models.swin_transformer")
    if swin is None:
        return ()
    return swin.ShiftedWindowAttention.forward, swin.ShiftedWindowAttentionV2.forward


def _through_layers(module: nn.Module, *, crossing: bool) -> nn.Module:
    if isinstance(module, nn.MultiheadAttention):
        return ProjectedAttention.from_float(module, crossing=crossing)
    own: Any = type(module)
    if hasattr(module, "qkv_bias_separate"):
        # timm's own switch: a bias that is added after self.qkv(x).
        twin = with_class(module, own)
        twin.qkv_bias_separate = True
        return twin
    twin = with_class(module, _windows_class(own))
    if hasattr(module, "logit_scale") and twin.qkv.bias is not None:
        twin.qkv = with_class(twin.qkv, _QueryAndValueBias)
    return twin


@cache
def _windows_class(own: Any) -> type[nn.Module]:
    return made_class(own.__name__, ProjectedWindows, own, _windows_class, own)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]  # None: no bias
    return layer


def _part(packed: nn.Parameter, row: int) -> nn.Parameter:
    part = packed.detach().chunk(3)[row].clone()
    return nn.Parameter(part, requires_grad=packed.requires_grad)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """What is added to the scores ``[N, heads, L, S]``; keys that were appended are not masked."""
    masks = []
    if attn_mask is not None:
        heads = q.shape[1]
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    merged = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
        mask = F.pad(mask.to(q.dtype), (0, k.shape[2] - mask.shape[-1]))
        merged = mask if merged is None else merged + mask
    return merged


def _windows_apart(grid: list[int], window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """``[windows, 1, inside, inside]``: -100 where two positions were not neighbours unshifted."""
    region = like.new_zeros(grid[0] * window[0], grid[1] * window[1])
    bounds = [
        (slice(0, -side), slice(-side, -step), slice(-step, None))
        for side, step in zip(window, shift, strict=True)
    ]
    for number, (rows, columns) in enumerate(itertools.product(*bounds)):
        region[rows, columns] = number
    region = region.unflatten(0, (grid[0], window[0])).unflatten(2, (grid[1], window[1]))
    region = region.transpose(1, 2).reshape(grid[0] * grid[1], -1)
    different = region.unsqueeze(1) != region.unsqueeze(2)
    return (different.to(like.dtype) * -100.0).unsqueeze(1)
