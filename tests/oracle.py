"""The delta rule token by token in float64, written apart from the package, and inputs to try it on."""

import torch

KEYS = ("gaussian", "silu", "correlated", "identical", "zero")
NAMES = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dh0")


def delta_rule(q, k, v, beta, scale=None, h0=None, l2=False, cu_seqlens=None):
    """[B, T, H, ...] -> (o, final state), in float64 and differentiable."""
    q, k, v, beta = _exact(q, k, v, beta, scale, l2)
    bounds = [(b, 0, q.shape[1]) for b in range(len(q))]
    if cu_seqlens is not None:
        bounds = [(0, start, end) for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    rows, states = [[] for _ in q], []
    for n, (b, start, end) in enumerate(bounds):
        S = q.new_zeros(q.shape[2], q.shape[3], v.shape[3]) if h0 is None else h0[n].double()
        for t in range(start, end):
            error = v[b, t] - torch.einsum("hkv,hk->hv", S, k[b, t])
            S = S + torch.einsum("hk,hv->hkv", k[b, t], beta[b, t, :, None] * error)
            rows[b].append(torch.einsum("hkv,hk->hv", S, q[b, t]))
        states.append(S)
    if cu_seqlens is not None:
        rows[0] += [v[0, 0] * 0] * (q.shape[1] - bounds[-1][2])
    return torch.stack([torch.stack(row) for row in rows]), torch.stack(states)


def delta_rule_batched(q, k, v, beta, scale=None, h0=None, l2=False, cu_seqlens=None):
    """`delta_rule` with all rows and heads of a token at once: some hundred tokens take no time on a GPU."""
    q, k, v, beta = _exact(q, k, v, beta, scale, l2)
    (B, T, H, K), V = q.shape, v.shape[-1]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        S = q.new_zeros(B, H, K, V) if h0 is None else h0[n * B : (n + 1) * B].double()
        for t in range(start, end):
            error = v[:, t] - (k[:, t, :, None] @ S).squeeze(2)
            S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
            outputs.append((q[:, t, :, None] @ S).squeeze(2))
        states.append(S)
    outputs += [v[:, 0] * 0] * (T - bounds[-1])
    return torch.stack(outputs, 1), torch.cat(states)


def _exact(q, k, v, beta, scale, l2):
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    if l2:
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, beta


def tokens(B, T, H, K, V, keys="gaussian", beta=None, dtype=torch.float32, seed=0):
    """q, k, v, beta. Keys other than zero have norm one up to rounding; `beta` fixes it, None draws it from (0, 1)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    q, k, v, b = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), torch.rand(B, T, H, generator=g)
    if keys == "silu":
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    elif keys == "correlated":
        k = 0.9**0.5 * draw(1, 1, H, K) + 0.1**0.5 * k
    elif keys == "identical":
        k = draw(1, 1, H, K).expand_as(k)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    k = k * 0 if keys == "zero" else k
    b = b if beta is None else torch.full_like(b, beta)
    return [x.to(dtype) for x in (q, k, v, b)]


def state(N, H, K, V, dtype=torch.float32, seed=1):
    return torch.randn(N, H, K, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function, inputs, seed=2):
    """Results of `function(*inputs)` and its gradients in all inputs, for fixed random gradients of the results."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    g = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(x.shape, generator=g).to(x) for x in results]
    gradients = torch.autograd.grad(results, inputs, gradients, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in results), *gradients]


def relative_error(actual, expected):
    """L2 norm of the difference over that of `expected`; where that is zero, only exact zeros do."""
    actual, expected = actual.double(), expected.double()
    if not torch.isfinite(actual).all():
        return float("inf")
    if not expected.any():
        return 0.0 if not actual.any() else float("inf")
    return ((actual - expected).norm() / expected.norm()).item()


def relative_errors(actual, expected, names=NAMES):
    return {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=False)}


def assert_within(errors, limit):
    """Every error within `limit`: a number, or one for each. A failure shows all errors."""
    limits = [limit] * len(errors) if isinstance(limit, float) else limit
    too_far = [name for (name, error), bound in zip(errors.items(), limits) if not error <= bound]
    assert not too_far, f"{too_far} beyond {limit}: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items())


def assert_close(actual, expected, limit, names=NAMES):
    assert_within(relative_errors(actual, expected, names), limit)
