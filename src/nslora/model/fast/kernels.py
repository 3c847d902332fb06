"""Faster layers for a model of transformers and PEFT: decoding first, then training.

| here               | replaces                                 | saves                                            |
| ------------------ | ---------------------------------------- | ------------------------------------------------ |
| `PreallocatedLayer`| `DynamicLayer` of a KV cache             | copying the whole cache at each new token        |
| `blocked_weights`  | frozen `nn.Linear` on a CPU              | two thirds of the time to read weights           |
| `lora_products`    | PEFT's LoRA layer                        | casts, and sums in passes of their own           |
| `summed_nll`       | cross entropy in float32                 | float32 logits, and a pass for the gradient      |
| `rms_norm`         | transformers' RMSNorm                    | float32 intermediates kept for the gradient      |

Same numbers: tests/model/fast/test_kernels.py, values and gradients against the plain formulas in float64.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

# names of layers in transformers' models that have one and the same input
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# tokens for which a cache makes room at once
ROOM = 64
# number of rows for which oneDNN chooses a layout of weights
LAYOUT_ROWS = 64
# rows of logits whose probabilities are in float32 at once: few stay in a CPU's cache, many keep a GPU busy
NLL_ROWS = 8
NLL_ROWS_GPU = 256
# oneDNN and torch's layer above it keep the code of 1024 products each, some 0.4 MB a shape: memory would grow with the
# number of batches, until all are kept. 128 are enough for the shapes that batches mostly have (`packing.EVEN`).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")

LoraTensors = tuple[Tensor, Tensor | None, Tensor, Tensor]  # W, b, A, B
Gradients = tuple[Tensor | None, ...]
Usable = Callable[[Any], bool]  # of a module
Outputs = Callable[[Tensor], Sequence[Tensor]]  # of several layers, of their common input


class PreallocatedLayer(DynamicLayer):
    """A layer of a KV cache with room at its end: a new token is written there, and nothing before it is copied.

        buffer  | k0 k1 k2 k3 k4 .. .. .. |      keys = buffer[..., :5, :], a view; the next token goes to slot 5

    `keys` and `values` that are no such view (rows were repeated, say) are copied into new room by the next token.
    """

    keys: Tensor
    values: Tensor
    buffers: Sequence[Tensor] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, new tokens, dim); return all of them so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # (B, heads, ROOM and more, dim) each; views of another cache's buffers are never written
        if not self._in_buffers() or end > self.buffers[0].shape[-2]:
            self._grow(key_states, value_states, start, end + ROOM)
        keys, values = self.buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys = keys[..., :end, :]
        self.values = values[..., :end, :]
        self.is_initialized = True
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. If they are the first n, some replaced by later ones, only the replacements are copied."""
        rows: list[int] = indices.tolist()
        count = len(rows)
        # a row below `count` that moves could be overwritten before it is read
        moved = [row for slot, row in enumerate(rows) if row != slot]
        if not self._in_buffers() or any(row < count for row in moved):
            super().batch_select_indices(indices)
            return
        for slot, row in enumerate(rows):
            if row != slot:
                self.keys[slot] = self.keys[row]
                self.values[slot] = self.values[row]
        self.buffers = [buffer[:count] for buffer in self.buffers]
        self.keys = self.keys[:count]
        self.values = self.values[:count]

    def _grow(self, key: Tensor, value: Tensor, start: int, size: int) -> None:
        """Make buffers for `size` tokens, else shaped like key and value, and copy the first `start` tokens."""
        self.buffers = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key, value)]
        if start:
            keys, values = self.buffers
            keys[..., :start, :] = self.keys
            values[..., :start, :] = self.values

    def _in_buffers(self) -> bool:
        """Whether keys (and so values) are a view of the buffers."""
        if not self.buffers:
            return False
        return self.keys.data_ptr() == self.buffers[0].data_ptr()


class SharedInput:
    """Sibling layers, called one after another with the same input: the first call computes the outputs of all."""

    def __init__(self, layers: Sequence[Any], outputs: Outputs) -> None:
        """Wrap `outputs`, which computes the outputs of `layers` in their order."""
        self.layers = layers
        self.outputs = outputs
        self.input: Tensor | None = None
        self.pending: dict[Any, Tensor] = {}

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """Return the output of one of the layers."""
        if input is not self.input or layer not in self.pending:
            outputs = self.outputs(input)
            self.pending = dict(zip(self.layers, outputs, strict=True))
            self.input = input
        output = self.pending.pop(layer)
        if not self.pending:
            # nothing is kept alive between forward passes
            self.input = None
        return output

    def forget(self) -> None:
        """Let go of outputs that nobody asked for: those of a forward pass that ended in an error."""
        self.pending = {}
        self.input = None


def sibling_layers(model: Any, usable: Usable) -> list[list[Any]]:
    """Return the usable modules of `model` in lists: those with the same input together, others alone."""
    families: list[list[Any]] = []
    for module in model.modules():
        for names in SIBLINGS:
            family = [_unwrapped(getattr(module, name, None), usable) for name in names]
            if all(layer is not None and usable(layer) for layer in family):
                families.append(family)
    # the others, each a family of its own
    members = {layer for family in families for layer in family}
    alone = [m for m in model.modules() if usable(m) and m not in members]
    return families + [[module] for module in alone]


def _unwrapped(layer: Any, usable: Usable) -> Any:
    """Return the layer, or what an adapter wraps in it if only that is usable."""
    if layer is None or usable(layer):
        return layer
    return getattr(layer, "base_layer", None)


@contextmanager
def blocked_weights(model: Any) -> Iterator[None]:
    """Let frozen linear layers on a CPU compute with a copy of their weights in oneDNN's blocked layout, made once.

    For the few rows of a decoding step torch's plain product reads weights at a third of that speed, and one product
    for siblings takes less than one each. The copy takes as much memory as the weights.
    """
    on_cpu = torch.backends.mkldnn.is_available() and model.device.type == "cpu"

    def usable(module: Any) -> bool:
        is_linear = on_cpu and type(module) is torch.nn.Linear
        return is_linear and not module.weight.requires_grad

    families = sibling_layers(model, usable)
    # shadows the class's forward until the context ends
    for family in families:
        blocked = _blocked_copy(family)
        bias = _joint_bias(family)
        shared = SharedInput(family, partial(_blocked_products, family, blocked, bias))
        for module in family:
            module.forward = partial(shared, module)
    try:
        yield
    finally:
        for family in families:
            for module in family:
                module.__dict__.pop("forward", None)


def _blocked_copy(family: Sequence[Any]) -> Tensor:
    """Return the joint weights (sum of outputs, in) in blocked layout, anew if a weight has changed since."""
    first = family[0]
    versions = [(m.weight.data_ptr(), m.weight._version) for m in family]
    if getattr(first, "blocked_versions", None) != versions:
        # (sum of outputs, in)
        joint = torch.cat([m.weight for m in family])
        first.blocked = torch.ops.mkldnn._reorder_linear_weight(joint, LAYOUT_ROWS)
        first.blocked_versions = versions
    return first.blocked


def _joint_bias(family: Sequence[Any]) -> Tensor | None:
    """Return the biases of all layers in one, zeros where a layer has none; None if no layer has one."""
    if all(m.bias is None for m in family):
        return None
    biases = []
    for module in family:
        zeros = module.weight.new_zeros(module.out_features)
        biases.append(zeros if module.bias is None else module.bias)
    return torch.cat(biases)


def _blocked_products(
    family: Sequence[Any],
    blocked: Tensor,
    bias: Tensor | None,
    input: Tensor,
) -> Sequence[Tensor]:
    output = torch.ops.mkldnn._linear_pointwise(input, blocked, bias, "none", [], "")
    return output.split([m.out_features for m in family], -1)


def lora_products(
    x: Tensor,
    layers: Sequence[LoraTensors],
    scale: float,
) -> tuple[Tensor, ...]:
    """Compute LoRA (Hu et al., 2021) of layers with the same input: y = x W' + b + s (x A') B'.

    Args:
        x: (n, in).
        layers: W (out, in) and b (out,), which are frozen, A (rank, in) and B (out, rank) of each. A and B may be
            float32 beside a bfloat16 x, whose type the products have.

    Returns:
        y (n, out) of each layer. Sums are made within products, in y as in the gradient of x.
    """
    tensors = [tensor for layer in layers for tensor in layer]
    products = _LoraProducts.apply(x, scale, *tensors)
    return cast(tuple[Tensor, ...], products)


class _LoraProducts(torch.autograd.Function):
    """With one stacked A of all layers: l = x A' is (n, sum of ranks), and each layer has columns of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *tensors: Any) -> tuple[Tensor, ...]:
        # the four tensors of each layer, one layer after another
        weights, biases = tensors[0::4], tensors[1::4]
        down, up = tensors[2::4], tensors[3::4]
        a = torch.cat(down).to(x.dtype)
        up = [b.to(x.dtype) for b in up]
        # one thin product for all layers
        low = F.linear(x, a)
        ctx.scale = scale
        ctx.ranks = [len(matrix) for matrix in down]
        ctx.save_for_backward(x, low, a, *weights, *up)
        outputs = []
        lows = low.split(ctx.ranks, 1)
        for weight, bias, b, own in zip(weights, biases, up, lows, strict=True):
            y = F.linear(x, weight, bias)
            # y += s l B', summed within the product
            y.addmm_(own, b.t(), alpha=scale)
            outputs.append(y)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x, low, a, *rest = ctx.saved_tensors
        weights = rest[: len(grads)]
        up = rest[len(grads) :]
        # dl = s dy B of each layer, side by side: (n, sum of ranks)
        of_lows = [torch.mm(grad, b) for grad, b in zip(grads, up, strict=True)]
        of_low = torch.cat(of_lows, 1).mul_(ctx.scale)
        # dx = dl A + sum of dy W
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(of_low, a)
            for grad, weight in zip(grads, weights, strict=True):
                of_x.addmm_(grad, weight)
        # dA = dl' x, and dB = s dy' l
        of_a = torch.mm(of_low.t(), x).float()
        of_as = of_a.split(ctx.ranks)
        lows = low.split(ctx.ranks, 1)
        of_tensors = []
        for grad, own, da in zip(grads, lows, of_as, strict=True):
            # the order of the arguments: W, b, A, B
            db = torch.mm(grad.t(), own).mul_(ctx.scale)
            of_tensors += [None, None, da, db.float()]
        return of_x, None, *of_tensors


def summed_nll(
    logits: Tensor, targets: Tensor, reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood (nats, float32) of targets (n,) under logits (n, V) of any type.

    Few rows are in float32 at a time, and of them the gradient, softmax - one-hot, is all that is kept. With the logits
    of a `reference` model, (n, V), the gradient is that of the cross entropy of its probabilities and ours instead,
    softmax - softmax of the reference: knowledge distillation (Hinton et al., 2015).

    Returns:
        The sum, a scalar with a gradient, and the terms (n,), without; both of the targets.
    """
    return cast(tuple[Tensor, Tensor], _SummedNll.apply(logits, targets, reference))


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(logits)
        nll = logits.new_empty(len(logits), dtype=torch.float32)
        # softmax - one-hot, written over the probabilities
        count = NLL_ROWS if logits.device.type == "cpu" else NLL_ROWS_GPU
        minus_one = nll.new_full((count, 1), -1.0)
        for start in range(0, len(logits), count):
            rows = slice(start, start + count)
            # (rows, 1)
            index = targets[rows, None]
            log = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
            nll[rows] = -log.gather(1, index)[:, 0]
            probability = log.exp_()
            if reference is None:
                grad[rows] = probability.scatter_add_(1, index, minus_one)
            else:
                wanted = torch.softmax(reference[rows], -1, dtype=torch.float32)
                grad[rows] = probability.sub_(wanted)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        # of the sum; the terms have no gradient
        return ctx.saved_tensors[0] * grads[0], None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm (Zhang and Sennrich, 2019): y = w n, n = x / sqrt(mean(x^2) + eps) over the last dimension.

    w is frozen. The root is in float32, n and y have the type of x. The gradient is (g - n mean(g n)) / root, g = w dy.
    """
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # float64 stays what it is
        dtype = torch.promote_types(x.dtype, torch.float32)
        exact = x.to(dtype, copy=True)
        # (..., 1), in place from here on
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        mean_square = length.square_().div_(x.shape[-1])
        inverse_root = mean_square.add_(eps).rsqrt_()
        normed = exact.mul_(inverse_root).to(x.dtype)
        ctx.save_for_backward(normed, inverse_root, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        normed, inverse_root, weight = ctx.saved_tensors
        grad = grads[0] * weight
        # minus mean(g n), (..., 1)
        dot = (grad * normed).sum(-1, keepdim=True, dtype=torch.float32)
        along = dot.div_(-normed.shape[-1])
        of_x = torch.addcmul(grad, normed, along.to(grad.dtype))
        return of_x.mul_(inverse_root.to(grad.dtype)), None, None


def train_norms(model: Any) -> None:
    """Let norms of Llama's kind in `model` (frozen weight times normed input) be `rms_norm` where gradients flow."""
    for module in model.modules():
        is_norm = type(module).__name__.endswith("RMSNorm")
        if is_norm and hasattr(module, "variance_epsilon"):
            module.forward = partial(_trained_norm, module)


def _trained_norm(module: Any, x: Tensor) -> Tensor:
    # without gradients transformers' own is as fast
    if not torch.is_grad_enabled() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)
