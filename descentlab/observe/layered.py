"""Dense curvature of plain networks (linear maps with element-wise activations between them), written out.

For one sample let z_l = W_l a_(l-1) + b_l, a_l = s(z_l), delta_l = dL/dz_l and E_lm = d2L / dz_l dz_m, where z_l is
disturbed and everything behind it follows. From the last layer backwards

    E_ll = S' W^T E_(l+1,l+1) W S' + diag(s''(z_l) W^T delta_(l+1)),    E_lm = (dz_m/dz_l)^T E_mm for l < m,

and the block of the weights W_l[i, j] and W_m[p, q] is the sum over samples of

    a_(l-1)[j] (E_lm[i, p] a_(m-1)[q] + delta_m[p] da_(m-1)[q] / dz_l[i]).

A bias is a weight on a constant input. The generalised Gauss-Newton matrix has neither the diagonal nor the last term.
What :func:`recognise` and :func:`_output_curvature` do not accept is left to the general route.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .operators import Loss

CHUNK_BYTES = 2**25  # largest intermediate result
ELEMENTWISE = (nn.SiLU, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softsign)


class Layer(NamedTuple):
    """Names of a linear map's weight and bias among the parameters, and the activation after it."""

    weight: str
    bias: str | None
    activation: nn.Module | None


class Plain(NamedTuple):
    """The layers of a plain network; ``flat``: inputs are flattened first."""

    layers: tuple[Layer, ...]
    flat: bool


def recognise(model: nn.Module) -> Plain | None:
    """The layers of a plain network: an ``nn.Sequential`` (nested at will), or a module that declares its only child to
    be all of its forward pass by an attribute ``plain = True`` of its own class. None for anything else."""
    found: list[tuple[str, nn.Module]] = []
    if not _unroll("", model, found):
        return None
    layers: list[Layer] = []
    flat = False
    for name, module in found:
        if type(module) is nn.Linear:
            layers.append(Layer(f"{name}weight", f"{name}bias" if module.bias is not None else None, None))
        elif type(module) is nn.Flatten and not layers and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif type(module) in ELEMENTWISE and layers and layers[-1].activation is None:
            layers[-1] = layers[-1]._replace(activation=module)
        elif not (type(module) is nn.Identity or (type(module) is nn.Dropout and not module.training)):
            return None
    distinct = len({id(p) for p in model.parameters()}) == sum(1 + (layer.bias is not None) for layer in layers)
    return Plain(tuple(layers), flat) if layers and distinct else None


def _unroll(prefix: str, module: nn.Module, found: list[tuple[str, nn.Module]]) -> bool:
    """Leaves in order of execution; False where the order is not known or a hook may interfere."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    children = list(module._modules.items())
    whole = vars(type(module)).get("plain") is True and len(children) == 1 and not module._parameters
    if type(module) is nn.Sequential or whole:
        return all(child is not None and _unroll(f"{prefix}{name}.", child, found) for name, child in children)
    found.append((prefix, module))
    return not children


class _Sample(NamedTuple):
    """One layer's side of the pass, all ``[M, B, …]``: inputs with a one behind where there is a bias, the
    activation's first and second derivative (None: no activation)."""

    inputs: Tensor
    slope: Tensor | None
    bend: Tensor | None


def dense(
    plain: Plain, weights: Mapping[str, Tensor], names: Sequence[str], loss: Loss, x: Tensor, y: object, curved: bool
) -> Tensor | None:
    """The matrices ``[M, n, n]`` of the parameters ``names`` at ``weights`` (each ``[M, *shape]``, float64).

    ``curved``: the Hessian, else the Gauss-Newton matrix. None where the loss is no sum over samples of a function of
    the sample's output, or outputs are no rows.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    x = x.flatten(1) if plain.flat else x
    if x.dim() != 2 or x.shape[1] != weights[plain.layers[0].weight].shape[2]:
        return None
    samples, out = _forward(plain, weights, x.double())
    ends = [_output_curvature(loss, one, y) for one in out]
    if any(end is None for end in ends):
        return None
    slope = torch.stack([end[0] for end in ends if end is not None])
    bend = torch.stack([end[1] for end in ends if end is not None])
    last = samples[-1]
    if last.slope is not None:  # an activation after the last linear map
        assert last.bend is not None
        bend = last.slope.unsqueeze(-1) * bend * last.slope.unsqueeze(-2)
        bend = bend + torch.diag_embed(last.bend * slope) if curved else bend
        slope = last.slope * slope
    blocks: dict[tuple[int, int], Tensor] = {}
    chunk = _chunk(plain, weights, len(out))
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        part = [_Sample(*(None if t is None else t[:, rows] for t in s)) for s in samples]  # type: ignore[arg-type]
        _add(blocks, set(names), plain, weights, part, slope[:, rows], bend[:, rows], curved)
    return _assembled(blocks, plain, weights, names)


def _chunk(plain: Plain, weights: Mapping[str, Tensor], members: int) -> int:
    """Samples taken at once."""
    shapes = [weights[layer.weight].shape[1:] for layer in plain.layers]
    largest = max(h * (d + 1) for h, d in shapes) * max(h for h, _ in shapes)
    return max(64, CHUNK_BYTES // (8 * members * largest))


def _forward(plain: Plain, weights: Mapping[str, Tensor], x: Tensor) -> tuple[list[_Sample], Tensor]:
    members = len(weights[plain.layers[0].weight])
    a = x.expand(members, *x.shape)
    samples = []
    for layer in plain.layers:
        inputs = a if layer.bias is None else torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
        z = a @ weights[layer.weight].mT
        if layer.bias is not None:
            z = z + weights[layer.bias].unsqueeze(1)
        if layer.activation is None:
            a, slope, bend = z, None, None
        else:
            a, slope, bend = _derivatives(layer.activation, z)
        samples.append(_Sample(inputs, slope, bend))
    return samples, a


def _derivatives(activation: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative, element by element."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = activation(z)
        (slope,) = torch.autograd.grad(a, z, torch.ones_like(a), create_graph=True)
        if not slope.requires_grad:
            return a.detach(), slope, torch.zeros_like(slope)
        (bend,) = torch.autograd.grad(slope, z, torch.ones_like(a), allow_unused=True, materialize_grads=True)
    return a.detach(), slope.detach(), bend


def _output_curvature(loss: Loss, out: Tensor, y: object) -> tuple[Tensor, Tensor] | None:
    """Gradient ``[B, K]`` and second derivatives ``[B, K, K]`` of the loss by each sample's output.

    K products with the same direction in all samples give them if samples do not mix; one product with a random
    direction shows whether they do (then None).
    """
    known = _known(loss, out, y)
    if known is not None:
        return known
    samples, outputs = out.shape
    with torch.enable_grad():
        leaf = out.detach().requires_grad_()
        value = loss(leaf, y.double() if isinstance(y, Tensor) and y.is_floating_point() else y)
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            return None
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        if not slope.requires_grad:
            return slope, slope.new_zeros(samples, outputs, outputs)
        probes = torch.zeros(outputs + 1, samples, outputs, dtype=out.dtype, device=out.device)
        probes[:outputs] = torch.eye(outputs, dtype=out.dtype, device=out.device).unsqueeze(1)
        noise = torch.randn(samples, outputs, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
        probes[outputs] = noise.to(out.device)
        (seen,) = torch.autograd.grad(slope, leaf, probes, is_grads_batched=True)
    bend = seen[:outputs].permute(1, 2, 0)
    expected = (bend @ probes[outputs].unsqueeze(-1)).squeeze(-1)
    if not (seen[outputs] - expected).abs().max() <= 1e-12 * bend.abs().max():
        return None
    return slope.detach(), bend


def _known(loss: Loss, out: Tensor, y: object) -> tuple[Tensor, Tensor] | None:
    """The same in closed form for the cross entropy of class indices; None for other losses."""
    if loss is not F.cross_entropy or not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        return None
    if len(y) != len(out) or bool((y < 0).any()):  # -100 marks samples to be left out
        return None
    p = out.softmax(-1)
    slope = (p - F.one_hot(y, out.shape[1])) / len(y)
    bend = -p.unsqueeze(-1) * (p / len(y)).unsqueeze(-2)
    bend.diagonal(dim1=-2, dim2=-1).add_(p / len(y))
    return slope, bend


def _add(
    blocks: dict[tuple[int, int], Tensor],
    names: set[str],
    plain: Plain,
    weights: Mapping[str, Tensor],
    samples: Sequence[_Sample],
    delta: Tensor,
    bend: Tensor,
    curved: bool,
) -> None:
    """Add what these samples contribute to the blocks (lower layer, same or higher layer); see :func:`_assembled`."""
    deltas, own = _backward(plain, weights, samples, delta, bend, curved)
    wanted = [layer.weight in names or layer.bias in names for layer in plain.layers]
    for low in range(len(plain.layers)):
        if not wanted[low]:
            continue
        _gather(blocks, (low, low), _own_block(samples[low].inputs, own[low]))
        slope = samples[low].slope
        pushed = torch.diag_embed(torch.ones_like(deltas[low]) if slope is None else slope)  # da_(high-1) / dz_low
        for high in range(low + 1, len(plain.layers)):
            moved = weights[plain.layers[high].weight].unsqueeze(1) @ pushed  # dz_high / dz_low [M, B, high, low]
            if wanted[high]:
                pair = samples[low].inputs, samples[high].inputs
                made = _pair_block(*pair, moved.mT @ own[high], deltas[high], pushed if curved else None)
                _gather(blocks, (low, high), made)
            slope = samples[high].slope
            pushed = moved if slope is None else slope.unsqueeze(-1) * moved


def _gather(blocks: dict[tuple[int, int], Tensor], key: tuple[int, int], more: Tensor) -> None:
    blocks[key] = blocks[key].add_(more) if key in blocks else more


def _backward(
    plain: Plain,
    weights: Mapping[str, Tensor],
    samples: Sequence[_Sample],
    delta: Tensor,
    bend: Tensor,
    curved: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """(delta_l, E_ll) of every layer."""
    deltas, own = [delta], [bend]
    for layer in range(len(plain.layers) - 2, -1, -1):
        w = weights[plain.layers[layer + 1].weight]
        up = deltas[0] @ w
        inner = w.mT.unsqueeze(1) @ (own[0] @ w.unsqueeze(1))
        slope, second = samples[layer].slope, samples[layer].bend
        if slope is not None and second is not None:
            inner = slope.unsqueeze(-1) * inner * slope.unsqueeze(-2)
            if curved:
                inner.diagonal(dim1=-2, dim2=-1).add_(second * up)
            up = slope * up
        deltas.insert(0, up)
        own.insert(0, inner)
    return deltas, own


@functools.lru_cache(maxsize=32)
def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs i <= j ``[2, P]``, and the number of the pair of any i and j ``[size * size]``."""
    upper = torch.triu_indices(size, size, device=device)
    number = torch.empty(size, size, dtype=torch.int64, device=device)
    number[upper[0], upper[1]] = number[upper[1], upper[0]] = torch.arange(upper.shape[1], device=device)
    return upper, number.flatten()


def _own_block(inputs: Tensor, own: Tensor) -> Tensor:
    """The block of a layer with itself ``[M, pairs of outputs, pairs of inputs]``."""
    (i, p), (j, q) = _pairs(own.shape[-1], own.device)[0], _pairs(inputs.shape[-1], own.device)[0]
    return own[..., i, p].mT @ (inputs[..., j] * inputs[..., q])


def _pair_block(left: Tensor, right: Tensor, between: Tensor, delta: Tensor, pushed: Tensor | None) -> Tensor:
    """The block of two layers ``[M, inputs, outputs, outputs, inputs]``, a few of the lower one's outputs at a time."""
    members, count, lows, highs = between.shape
    step = max(1, CHUNK_BYTES // (8 * members * count * highs * right.shape[-1]))
    parts = []
    for first in range(0, lows, step):
        some = slice(first, first + step)
        terms = between[:, :, some, :, None] * right[:, :, None, None, :]
        if pushed is not None:
            terms[..., : pushed.shape[2]] += pushed.mT[:, :, some, None, :] * delta[:, :, None, :, None]
        block = left.mT @ terms.reshape(members, count, -1)
        parts.append(block.view(members, left.shape[-1], -1, highs, right.shape[-1]))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _assembled(
    blocks: Mapping[tuple[int, int], Tensor], plain: Plain, weights: Mapping[str, Tensor], names: Sequence[str]
) -> Tensor:
    """The matrices ``[M, n, n]``, symmetric to the bit: own blocks hold each pair once, others are mirrored."""
    at, first = {}, 0
    for name in names:
        at[name] = slice(first, first + weights[name][0].numel())
        first = at[name].stop
    members = len(weights[plain.layers[0].weight])
    linear = [(weights[layer.weight].shape, layer.bias is not None) for layer in plain.layers]
    shapes = [(shape[1], shape[2] + constant) for shape, constant in linear]
    some = next(iter(blocks.values()))
    total = torch.empty(members, first, first, dtype=some.dtype, device=some.device)
    for (low, high), block in blocks.items():
        places = [_places(plain.layers[k], at, shapes[k][1]) for k in (low, high)]
        for rows, columns in itertools.product(*places):
            target = total[:, rows.at, columns.at]
            cells = target.view(members, shapes[low][0], rows.width, shapes[high][0], columns.width)
            if low == high:
                _unfold(block, cells, *shapes[low], rows.cut, columns.cut)
            else:
                cells.copy_(block[:, rows.cut, :, :, columns.cut].transpose(1, 2))
                total[:, columns.at, rows.at] = target.mT
    return total


class _Place(NamedTuple):
    """Where a weight or bias lies in the matrix, and which ``width`` of its layer's inputs it belongs to."""

    at: slice
    cut: slice
    width: int


def _places(layer: Layer, at: Mapping[str, slice], inputs: int) -> list[_Place]:
    """Of those parameters that are asked for; ``inputs``: with the constant one."""
    own = inputs - (layer.bias is not None)
    found = [
        (layer.weight, _Place(slice(0), slice(0, own), own)),
        (layer.bias, _Place(slice(0), slice(own, inputs), 1)),
    ]
    return [place._replace(at=at[name]) for name, place in found if name is not None and name in at]


def _unfold(pairs: Tensor, target: Tensor, outputs: int, inputs: int, rows: slice, columns: slice) -> None:
    """Write a layer's own block ``[M, pairs of outputs, pairs of inputs]`` to ``target`` ``[M, i, j, p, q]``."""
    high = _pairs(outputs, pairs.device)[1].view(outputs, outputs)
    low = _pairs(inputs, pairs.device)[1].view(inputs, inputs)[rows, columns]
    step = max(1, CHUNK_BYTES // (8 * len(pairs) * outputs * low.numel()))
    for first in range(0, outputs, step):
        chosen = high[first : first + step]
        part = pairs.index_select(1, chosen.flatten()).index_select(2, low.flatten())
        part = part.view(len(pairs), *chosen.shape, *low.shape).transpose(2, 3)
        target[:, first : first + step] = part
