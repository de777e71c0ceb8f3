"""Weights stored as int8 codes with one scale per group, dequantized where they are used.

Shapes: R rows (outputs of a layer), C columns (its inputs), G = ceil(C / 128) groups in a row.

    weight = code * scale        code in -127 .. 127, scale in bfloat16, one per group

The scale is the largest magnitude of the group over 127, rounded up to bfloat16. It adds 1.6 % to
the bytes of the codes. An update dequantizes some rows, steps, and quantizes them with stochastic
rounding, so that updates far below one code are kept on average; Q-GaLore (Zhang et al. 2024,
arXiv:2407.08296) and APOLLO (Zhu et al. 2024, arXiv:2412.05270) train so. A departure: a scale
stays while its group fits it. A new one at every step would round every code of the group anew,
and a group that no gradient reaches would wander.

Embedding and head keep the dtype of the run, as in Q-GaLore: most rows get no gradient in a step,
and the loss depends on every rounding error of the logits.

Uses a private part of torch, checked on torch 2.11 and 2.13: `Tensor._make_wrapper_subclass`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from foam_lightning.model.roles import layer_of
from foam_lightning.plan import WeightsDtype

WEIGHTS_PER_SCALE = 128
_LARGEST_CODE = 127
# A new scale leaves room for a group to grow by 1/32, so that it stays for many steps. It is also
# replaced where the largest code would be below 3/4 of 127, which costs 0.4 bit.
_ROOM = 1 + 1 / 32
_LEAST_FILLED = 0.75


# ---- the arithmetic


def quantize(
    weights: Tensor,
    kept_scales: Tensor | None = None,
    round_codes: Callable[[Tensor], Tensor] = torch.round,
) -> tuple[Tensor, Tensor]:
    """Quantize weights.

    Weights that are codes times `kept_scales` come back as the same codes and scales, whatever the
    rounding, unless all codes of a group have become small.

    Args:
        weights: Shape (..., C), float32 or float64.
        kept_scales: The scales so far, (..., G); they stay where their group fits.
        round_codes: Rounds float32 numbers to integers, to the nearest or stochastically.

    Returns:
        Codes (..., C) in int8, and scales (..., G) in bfloat16.
    """
    largest = torch.cat(
        [
            torch.linalg.vector_norm(group, ord=torch.inf, dim=-1, dtype=torch.float32)
            for group in _groups(weights)
        ],
        dim=-1,
    )
    smallest_scales = _round_up(largest / _LARGEST_CODE)
    scales = _round_up(largest * (_ROOM / _LARGEST_CODE))
    if kept_scales is not None:
        fits = (smallest_scales <= kept_scales) & (smallest_scales >= _LEAST_FILLED * kept_scales)
        scales = torch.where(fits, kept_scales, scales)
    quotients = weights.clone()
    # The smallest normal number, since zeros alone have scale 0, by which nothing is divided.
    divisors = scales.clamp_min(torch.finfo(torch.bfloat16).tiny)
    for group, divisor in _groups_with_scales(quotients, divisors):
        group.div_(divisor)
    codes = round_codes(quotients).clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the weights in a dtype; in float32 and float64 without rounding.

    Args:
        codes: (..., C).
        scales: (..., G).
        dtype: That of the result, of which no second copy is made.
    """
    weights = codes.to(dtype)
    for group, scale in _groups_with_scales(weights, scales):
        group.mul_(scale)
    return weights


def _groups(weights: Tensor) -> Iterator[Tensor]:
    """Yield views of (..., n, 128) whole groups and of a narrower last one, (..., 1, rest)."""
    whole = weights.shape[-1] // WEIGHTS_PER_SCALE
    end = whole * WEIGHTS_PER_SCALE
    if whole:
        yield weights[..., :end].unflatten(-1, (whole, WEIGHTS_PER_SCALE))
    if end < weights.shape[-1]:
        yield weights[..., end:].unsqueeze(-2)


def _groups_with_scales(weights: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `_groups(weights)`, each with views of its scales that broadcast over it."""
    done = 0
    for group in _groups(weights):
        count = group.shape[-2]
        yield group, scales[..., done : done + count].unsqueeze(-1)
        done += count


def _round_up(x: Tensor) -> Tensor:
    """Round float32 numbers, 0 or more, up to bfloat16, so that no code is above 127."""
    bits = (x.view(torch.int32) + 0xFFFF) & -0x10000
    return bits.view(torch.float32).to(torch.bfloat16)


# ---- which weights, and their bytes


def is_int8(name: str, shape: Sequence[int], weights_dtype: WeightsDtype | None) -> bool:
    """Return whether a parameter is stored in int8: the matrices of the decoder layers are.

    Args:
        name: Qualified name.
        shape: Its shape.
        weights_dtype: That of the memory options.
    """
    return weights_dtype == "int8" and len(shape) == 2 and layer_of(name) is not None


def weight_layout(
    name: str, shape: Sequence[int], dtype: torch.dtype, weights_dtype: WeightsDtype | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """List shape and dtype of the tensors that store one parameter; the memory account counts them.

    Args:
        name: Qualified name.
        shape: Its shape.
        dtype: The dtype of the run.
        weights_dtype: That of the memory options.
    """
    if not is_int8(name, shape, weights_dtype):
        return [(tuple(shape), dtype)]
    num_groups = -(-shape[-1] // WEIGHTS_PER_SCALE)
    return [(tuple(shape), torch.int8), ((*shape[:-1], num_groups), torch.bfloat16)]


# ---- the parameter and its layer


class Int8Weight(Tensor):
    """A matrix that is stored in int8, and is to autograd one in the dtype of the run.

    Its gradient is an ordinary tensor of that dtype. `Int8Linear` and `FOAM` use codes and scales;
    other operators get the dequantized matrix, and one that would change it is refused.

    Args:
        codes: (R, C), int8.
        scales: (R, G), bfloat16.
        dtype: The dtype of the run.
    """

    codes: Tensor
    scales: Tensor
    # Functions in Python take this as any tensor; operators come to `__torch_dispatch__`.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Self], codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Self:
        """Make the tensor, which has no memory of its own."""
        made: Self = Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device
        )
        made.codes, made.scales = codes, scales
        return made

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """Do nothing; see `__new__`."""

    @override
    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight(codes={self.codes}, scales={self.scales}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: dict[str, Tensor], dtype: torch.dtype, *_: object
    ) -> "Int8Weight":
        return cls(tensors["codes"], tensors["scales"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator on the dequantized matrix."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales, args[0].dtype)
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} cannot change a weight that is stored in int8")
        plain = tree_map_only(Int8Weight, Int8Weight.dequantized, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def dequantized(self) -> Tensor:
        """Return the matrix as an ordinary tensor."""
        return dequantize(self.codes, self.scales, self.dtype)


class Int8Linear(nn.Linear):
    """A linear layer whose weight is an `Int8Weight`.

    In a state dict the weight is two tensors, `weight_codes` and `weight_scales`.

    Args:
        linear: The layer whose weight is quantized, to the nearest code.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach()
        codes, scales = quantize(weight.float())
        self.weight = nn.Parameter(Int8Weight(codes, scales, weight.dtype))
        self.bias = linear.bias

    @override
    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        weight = self._int8_weight
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, weight.codes, weight.scales
        )
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @property
    def _int8_weight(self) -> Int8Weight:
        weight: Tensor = self.weight
        assert isinstance(weight, Int8Weight)
        return weight

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move codes and scales to another device; a cast changes the dtype of the run only."""
        weight = self._int8_weight
        codes, scales = fn(weight.codes), fn(weight.scales).to(torch.bfloat16)
        dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
        if codes is not weight.codes or dtype != weight.dtype:
            self.weight = nn.Parameter(Int8Weight(codes, scales, dtype))
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _stored(self) -> dict[str, Tensor]:
        weight = self._int8_weight
        stored = {"weight_codes": weight.codes, "weight_scales": weight.scales}
        return stored if self.bias is None else {**stored, "bias": self.bias}

    @override
    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self._stored().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    @override
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = {prefix + name: tensor for name, tensor in self._stored().items()}
        missing_keys += stored.keys() - state_dict.keys()
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key not in stored
        ]
        for key in stored.keys() & state_dict.keys():
            tensor, found = stored[key], state_dict[key]
            if found.shape != tensor.shape:
                error_msgs.append(f"{key} has shape {found.shape} instead of {tensor.shape}")
            else:
                tensor.detach().copy_(found)


class _Product(torch.autograd.Function):
    """x @ weight.T: dequantizes in forward and again in backward, and saves only the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """Multiply.

        Args:
            ctx: Keeps `x`, codes and scales.
            x: (..., C), in the dtype of the product.
            weight: The parameter (R, C), which gets the gradient.
            codes: Its codes.
            scales: Its scales.
        """
        ctx.save_for_backward(x, codes, scales)
        ctx.weight_dtype = weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            return _multiply(x, dequantize(codes, scales, x.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x` and of the weight, an ordinary tensor.

        Args:
            ctx: See `forward`.
            grad: (..., R).
        """
        x, codes, scales = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(grad, dequantize(codes, scales, grad.dtype))
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply (..., K) and (K, N) as one product of matrices, as a linear layer does."""
    product: Tensor = (x.flatten(0, -2) @ matrix).unflatten(0, x.shape[:-1])
    return product


def use_int8_weights(model: nn.Module) -> None:
    """Replace the linear layers of the decoder layers by `Int8Linear`, in place.

    Each is quantized and freed before the next one.

    Args:
        model: A model of transformers.
    """
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_int8(f"{name}.weight", module.weight.shape, "int8")
    ]
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, Int8Linear(linear))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model with every weight in the dtype of the run.

    Args:
        model: With int8 weights or without.
    """
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Int8Weight):
            del state[f"{name}_codes"], state[f"{name}_scales"]
            state[name] = parameter.dequantized()
    return state
