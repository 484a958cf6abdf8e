"""What Triton kernels are held to in the interpreter: float64, any order of programs, NaN first.

bf16 is for the kernels' logic only (the interpreter rounds it wrongly): it gives no tolerance.
"""

import random
from contextlib import contextmanager

import torch
import triton.runtime.interpreter as interpreter

# fp32 sums may be taken in another order: some roundings. Else the result is rounded once.
ROUNDING = {torch.float32: 8 * 2.0**-24, torch.float16: 2.0**-11}


@contextmanager
def in_float64():
    """References form fp32 inside by ``.float()``; here float64 stays float64."""
    plain = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else plain(x)
    try:
        yield
    finally:
        torch.Tensor.float = plain


@contextmanager
def shuffled(seed):
    """Programs of a grid run in another order; equal bits then mean that none waits for another."""
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx
    orders = {}

    def set_grid_idx(x, y, z):
        dims = tuple(builder.grid_dim)
        if dims not in orders:
            cells = [
                (i, j, k) for i in range(dims[0]) for j in range(dims[1]) for k in range(dims[2])
            ]
            random.Random(seed).shuffle(cells)
            orders[dims] = cells
        return plain(*orders[dims][(x * dims[1] + y) * dims[2] + z])

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_idx = plain


@contextmanager
def poisoned():
    """Tensors begin as NaN (integers at their largest), so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


def gradients(op, inputs, grads):
    """Outputs of ``op`` and gradients of its float inputs, for given gradients of the outputs.

    Args:
        op: takes the inputs, returns a tensor or a tuple of them.
        inputs: tensors, numbers or None; float tensors get gradients.
        grads: of the outputs; None: of no use.
    """
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]  # fmt: skip
    out = op(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    used = [(o, g.to(o.dtype)) for o, g in zip(out, grads, strict=True) if g is not None]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    got = torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True)
    return [o.detach() for o in out if isinstance(o, torch.Tensor)], list(got)


def doubled(inputs):
    """The inputs in float64."""
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]


def distance(ours, exact, norm=None):
    """Frobenius distance over ``norm``, which is that of ``exact``; of two zeros 0."""
    exact = exact.double()
    norm = exact.norm() if norm is None else norm
    gap = (ours.double() - exact).norm()
    return float(gap / norm) if norm else float(gap)


def check(op, reference, inputs, grads, norms=None, least=0.0, ordered=True):
    """Hold an op against its reference in float64, forward and backward.

    The yardstick is the reference in the inputs' own dtype: an error at most its error
    plus ``ROUNDING``. Twice with shuffled programs: equal bits.

    Args:
        op: in Triton.
        reference: the plain op.
        inputs: of both.
        grads: of the outputs.
        norms: of a gradient, by its number, what errors are measured by where its terms cancel.
        least: relative error that the format itself allows, where it is above ``ROUNDING``.
        ordered: sums keep an order; else they are held to the bound in one order of programs.
    """
    rounding = max(
        least, *(ROUNDING[x.dtype] for x in inputs if getattr(x, "dtype", None) in ROUNDING)
    )
    with in_float64():
        exact = gradients(reference, doubled(inputs), grads)
    plain = gradients(reference, inputs, grads)
    runs = []
    for seed in (0, 1) if ordered else (0,):
        with poisoned(), shuffled(seed):
            runs.append(gradients(op, inputs, grads))
    for part, name in ((0, "output"), (1, "gradient")):
        assert len(runs[0][part]) == len(exact[part])
        for number, (once, again, truth, eager) in enumerate(
            zip(runs[0][part], runs[-1][part], exact[part], plain[part], strict=True)
        ):
            if truth is None:
                assert once is None, f"{name} {number}"
                continue
            assert torch.equal(once, again), f"{name} {number} depends on the order of programs"
            norm = (norms or {}).get(number) if name == "gradient" else None
            bound = distance(eager, truth, norm) + rounding
            error = distance(once, truth, norm)
            assert error <= bound, f"{name} {number}: {error:.2e} > {bound:.2e}"
            assert once.dtype == eager.dtype, f"{name} {number}"
            assert once.shape == eager.shape, f"{name} {number}"
