"""The delta rule in plain PyTorch: the recurrence, and a fast chunked form with its own backward.

The recurrence is the definition (arXiv 2406.06484, section 2.2). The chunked form (equations 8 to 11) is what runs on a
CPU, on MPS and wherever no fused kernel applies. Symbols: see the glossary of `delta_rule.py`.

Arithmetic is float32, or float64 for float64 inputs. With A = tril(diag(beta) K Kᵀ, -1), T = (I + A)⁻¹ of a chunk:

    R  = V - K S               what the memory does not yet know
    Vn = T diag(beta) R        the chunk's new values, all tokens at once
    O  = Q S + tril(Q Kᵀ) Vn
    S <- S + Kᵀ Vn

Backward, from the last chunk to the first, with dS the gradient of the state that leaves the chunk:

    dVn = tril(Q Kᵀ)ᵀ dO + K dS          G = Tᵀ dVn          dV = diag(beta) G
    dP  = tril(dO Vnᵀ)                   dA = -tril(G Vnᵀ, -1)
    dQ  = dP K + dO Sᵀ
    dK  = dPᵀ Q + Vn dSᵀ - dV Sᵀ + diag(beta) dA K + dAᵀ diag(beta) K
    dbeta = rowsum(G * R) + rowsum(dA K * K)
    dS <- dS + Qᵀ dO - Kᵀ dV
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
L2_EPS = 1e-6


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the states for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrent_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: Optional[float] = None,
    initial_state: Optional[Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Optional[Tensor] = None,
) -> tuple[Tensor, Optional[Tensor]]:
    """One token after the other, out of differentiable operations. Shapes and dtypes as in `chunk_delta_rule`.

    Packed boundaries are read on the host: a reference, not a path for production on a GPU.
    """
    dtype, (B, T, H, K), V = compute_dtype(q.dtype), q.shape, v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = q.new_zeros((B * (len(bounds) - 1), H, K, V), dtype=dtype)
    q, k, v_dtype, v, beta = q.to(dtype), k.to(dtype), v.dtype, v.to(dtype), beta.to(dtype)
    if use_qk_l2norm_in_kernel:
        q, k = (x * inverse_norm(x) for x in (q, k))
    x = (q * scale, k, v, beta)
    outputs, states = [], []
    for S, start, end in zip(initial_state.to(dtype).split(B), bounds, bounds[1:]):
        o, S = _recurrence(*(z[:, start:end] for z in x), S)
        outputs.append(o)
        states.append(S)
    outputs.append(torch.zeros_like(v[:, bounds[-1] :]))
    return torch.cat(outputs, 1).to(v_dtype), torch.cat(states) if output_final_state else None


def _recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):
        k_t = k[:, t, :, None]  # [B, H, 1, K]
        v_new = beta[:, t, :, None, None] * (v[:, t, :, None] - k_t @ S)
        S = S + k_t.mT @ v_new
        outputs.append((q[:, t, :, None] @ S).transpose(1, 2))
    return torch.cat(outputs, 1), S


def recurrent_forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens):
    """The recurrence behind the interface of `chunk_forward`; it saves no inverse."""
    o, final_state = recurrent_delta_rule_reference(
        q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens
    )
    empty = q.new_empty(0, dtype=compute_dtype(q.dtype))
    final_state = empty if final_state is None else final_state
    return o.contiguous(), final_state, torch.empty_like(empty), torch.empty_like(empty)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / sqrt(sum of squares + 1e-6) of the last dimension, kept as a dimension of one."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + L2_EPS).rsqrt()


class Chunks:
    """How the tokens of a batch are cut into chunks: [B, T, H, D] <-> [chunks, B * H, C, D], zero-padded.

    Packed sequences each start a chunk of their own. The number of chunks is then a bound that depends on shapes only,
    and which sequence a chunk belongs to stays on the device: nothing here waits for a GPU.
    """

    def __init__(self, q: Tensor, cu_seqlens: Optional[Tensor]):
        self.batch, self.length, self.heads = q.shape[:3]
        self.dtype = compute_dtype(q.dtype)
        # A short prompt would pay for a whole chunk of zeros.
        self.size = min(CHUNK, max(16, 1 << (self.length - 1).bit_length()))
        self.count = -(-self.length // self.size)
        self.sequence = None
        if cu_seqlens is not None:
            self._place(cu_seqlens.long())

    def _place(self, cu_seqlens: Tensor) -> None:
        device, sequences = cu_seqlens.device, len(cu_seqlens) - 1
        self.count = (self.length + sequences * (self.size - 1)) // self.size
        slots = self.count * self.size
        ends = ((cu_seqlens.diff() + self.size - 1) // self.size).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        chunk, token = torch.arange(self.count, device=device), torch.arange(self.length, device=device)
        self.sequence = torch.searchsorted(ends, chunk, right=True)  # `sequences` for a chunk of the bound not in use
        self.opens = starts[self.sequence] == chunk
        self.closes = torch.cat([ends, ends.new_full((1,), -1)])[self.sequence] == chunk + 1
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        self.tail = (owner == sequences)[:, None, None]
        slot = (starts[owner] * self.size + token - cu_seqlens[owner]).masked_fill(owner == sequences, slots)
        # Slots of no token read the row of zeros after the last one.
        self.source = slot.new_full((slots + 1,), self.length).scatter_(0, slot, token)[:-1]
        self.slot = slot.clamp(max=slots - 1)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, D], any strides and dtype -> [chunks, B * H, C, D] in the dtype of the arithmetic."""
        if self.sequence is not None:
            rows = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, self.source)
            rows = rows.unflatten(0, (self.count, self.size)).transpose(1, 2)
            return rows.to(self.dtype, memory_format=torch.contiguous_format).contiguous()
        out = x.new_empty((self.count, self.batch, self.heads, self.size, x.shape[-1]), dtype=self.dtype)
        for part, rows in self._pairs(out, x):
            part.copy_(rows)
        if self.length % self.size:
            out[-1, :, :, self.length % self.size :] = 0
        return out.flatten(1, 2)

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """[chunks, B * H, C, D] -> contiguous [B, T, H, D] of `dtype`; tokens of no sequence are zero."""
        if self.sequence is not None:
            rows = y.transpose(1, 2).flatten(0, 1).index_select(0, self.slot).masked_fill_(self.tail, 0)
            return rows.to(dtype)[None]
        out = y.new_empty((self.batch, self.length, self.heads, y.shape[-1]), dtype=dtype)
        for part, rows in self._pairs(y.unflatten(1, (self.batch, self.heads)), out):
            rows.copy_(part)
        return out

    def _pairs(self, chunks: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        whole = self.length // self.size
        rest = self.length - whole * self.size
        pairs = []
        if whole:
            rows = x[:, : whole * self.size].unflatten(1, (whole, self.size))
            pairs.append((chunks[:whole], rows.permute(1, 0, 3, 2, 4)))
        if rest:
            pairs.append((chunks[whole, :, :, :rest], x[:, whole * self.size :].transpose(1, 2)))
        return pairs

    def states(self, given: Optional[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A table of [N (+ 1 row for unused chunks), H, K, V] that a scan reads from and writes back to."""
        table = like.new_zeros((shape[0] + (self.sequence is not None), *shape[1:]), dtype=self.dtype)
        if given is not None:
            table[: shape[0]] = given
        return table

    def enter(self, i: int, S: Optional[Tensor], table: Tensor, edge: str) -> Tensor:
        """The state [B * H, K, V] with which a scan enters chunk i; `edge` is "opens", or "closes" in reverse."""
        if self.sequence is None:
            return table.flatten(0, 1) if S is None else S
        own = table.index_select(0, self.sequence[i : i + 1])[0]
        return own if S is None else torch.where(getattr(self, edge)[i], own, S)

    def leave(self, i: int, S: Tensor, table: Tensor) -> None:
        """Record the state; a dense scan works inside the table and has nothing to do."""
        if self.sequence is not None:
            table.index_copy_(0, self.sequence[i : i + 1], S[None])


class _Inputs(NamedTuple):
    q: Tensor  # [chunks, B * H, C, K], normalised when asked
    k: Tensor
    v: Tensor  # [chunks, B * H, C, V]
    beta: Tensor  # [chunks, B * H, C, 1]
    q_inverse_norm: Optional[Tensor]
    k_inverse_norm: Optional[Tensor]


def _load(chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, use_l2: bool) -> _Inputs:
    q, k, v, beta = (chunks.split(x) for x in (q, k, v, beta[..., None]))
    norms = (inverse_norm(q), inverse_norm(k)) if use_l2 else (None, None)
    if use_l2:
        q, k = q.mul_(norms[0]), k.mul_(norms[1])
    return _Inputs(q, k, v, beta, *norms)


def chunk_inverse(k: Tensor, beta: Tensor) -> Tensor:
    """T = (I + tril(diag(beta) K Kᵀ, -1))⁻¹ of chunks [..., C, K] and [..., C, 1], C being 16, 32 or 64.

    Substitution inside blocks of 16, then pairs of blocks merged by products. Power series of the whole matrix lose
    every digit on correlated keys; this order is as accurate as substitution and needs no triangular solver, which
    MPS does slowly.
    """
    A = (k @ k.mT).mul_(beta).flatten(0, -3)
    size, block = A.shape[-1], 16
    D = torch.stack([A[:, i : i + block, i : i + block] for i in range(0, size, block)], 1)
    T = torch.eye(block, dtype=A.dtype, device=A.device).expand(D.shape).contiguous()
    for i in range(1, block):
        T[..., i, :i] = -(D[..., i : i + 1, :i] @ T[..., :i, :i]).squeeze(-2)
    while block < size:
        corner = [A[:, i + block : i + 2 * block, i : i + block] for i in range(0, size, 2 * block)]
        merged = T.new_zeros((len(A), len(corner), 2 * block, 2 * block))
        first, second = T[:, 0::2], T[:, 1::2]
        merged[..., :block, :block], merged[..., block:, block:] = first, second
        merged[..., block:, :block] = -(second @ torch.stack(corner, 1) @ first)
        T, block = merged, 2 * block
    return T.view(*k.shape[:-1], size)


def chunk_forward(q, k, v, beta, scale, initial_state, output_final_state, use_l2, cu_seqlens):
    """The chunked form.

    Returns o [B, T, H, V] in v's dtype, the final state [N, H, K, V] (an empty tensor when not asked for) and, for the
    backward, the inverse T [B, T, H, 64]: row t of its chunk's matrix, in the dtype of the arithmetic. The fourth result
    is empty: other implementations save more.
    """
    chunks = Chunks(q, cu_seqlens)
    x = _load(chunks, q, k, v, beta, use_l2)
    T = chunk_inverse(x.k, x.beta)
    T_beta = T * x.beta.mT
    table = chunks.states(initial_state, _state_shape(q, v, cu_seqlens), q)
    o, S = x.v, None  # V, then R, then O in one place: fresh memory costs as much as the arithmetic on it
    for i in range(chunks.count):
        S = chunks.enter(i, S, table, "opens")
        Vn = T_beta[i] @ x.v[i].baddbmm_(x.k[i], S, alpha=-1)
        P = (x.q[i] @ x.k[i].mT).tril_()
        torch.bmm(x.q[i], S, out=o[i]).baddbmm_(P, Vn, beta=scale, alpha=scale)
        S.baddbmm_(x.k[i].mT, Vn)
        chunks.leave(i, S, table)
    final_state = table[: len(table) - (cu_seqlens is not None)] if output_final_state else table.new_empty(0)
    saved = chunks.join(F.pad(T, (0, CHUNK - chunks.size)), chunks.dtype)
    return chunks.join(o, v.dtype), final_state, saved, table.new_empty(0)


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Optional[Tensor]) -> tuple[int, ...]:
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    return sequences, q.shape[2], q.shape[3], v.shape[3]


def chunk_backward(do, dht, q, k, v, beta, Tinv, factors, scale, initial_state, use_l2, cu_seqlens):
    """Gradients of the chunked form; `dht` may be None, an empty `Tinv` is computed again, `factors` is not used.

    Returns dq, dk, dv, dbeta in the dtype of their inputs and dh0 in the dtype of the arithmetic, an empty tensor where
    there is no initial state.
    """
    chunks = Chunks(q, cu_seqlens)
    x = _load(chunks, q, k, v, beta, use_l2)
    T = chunks.split(Tinv)[..., : chunks.size] if Tinv.numel() else chunk_inverse(x.k, x.beta)
    shape = _state_shape(q, v, cu_seqlens)
    S, R, Vn = _replay(chunks, x, T, chunks.states(initial_state, shape, q))
    do, table, dS = chunks.split(do), chunks.states(dht, shape, q), None
    for i in reversed(range(chunks.count)):
        dS = chunks.enter(i, dS, table, "closes")
        chunk = _Inputs(*(z if z is None else z[i] for z in x))
        _chunk_gradients(chunk, T[i], do[i], S[i], R[i], Vn[i], dS, scale)
        chunks.leave(i, dS, table)
    gradients = [chunks.join(dz, z.dtype) for dz, z in zip(x, (q, k, v))]
    dh0 = table.new_empty(0) if initial_state is None else table[: shape[0]]
    return *gradients, chunks.join(x.beta, beta.dtype).squeeze(-1), dh0


def _replay(chunks: Chunks, x: _Inputs, T: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states that entered the chunks, and R (in the place of V) and Vn of every chunk."""
    Vn, S = torch.empty_like(x.v), None
    states = x.v.new_empty((*x.k.shape[:2], x.k.shape[-1], x.v.shape[-1]))
    T_beta = T * x.beta.mT
    for i in range(chunks.count):
        S = chunks.enter(i, S, table, "opens")
        states[i] = S
        torch.bmm(T_beta[i], x.v[i].baddbmm_(x.k[i], S, alpha=-1), out=Vn[i])
        S.baddbmm_(x.k[i].mT, Vn[i])
        chunks.leave(i, S, table)
    return states, x.v, Vn


def _chunk_gradients(x: _Inputs, T, do, S, R, Vn, dS, scale) -> None:
    """One chunk of the backward, in place: q, k, v, beta of x and `dS` become the gradients to hand on."""
    q, k, beta = x.q, x.k, x.beta
    P = (q @ k.mT).tril_()
    dVn = torch.bmm(k, dS).baddbmm_(P.mT, do, alpha=scale)
    G = T.mT @ dVn
    dv = G * beta
    dP = (do @ Vn.mT).tril_()
    dA = (G @ Vn.mT).tril_(-1).neg_()
    dA_k = dA @ k
    dq = torch.bmm(do, S.mT).baddbmm_(dP, k, beta=scale, alpha=scale)
    dk = torch.bmm(Vn, dS.mT).baddbmm_(dP.mT, q, alpha=scale)
    dk.baddbmm_(dv, S.mT, alpha=-1).baddbmm_(dA.mT, k * beta).addcmul_(dA_k, beta)
    dbeta = (G * R).sum(-1, keepdim=True) + (dA_k * k).sum(-1, keepdim=True)
    dS.baddbmm_(q.mT, do, alpha=scale).baddbmm_(k.mT, dv, alpha=-1)
    if x.q_inverse_norm is not None:
        dq, dk = _norm_gradient(dq, q, x.q_inverse_norm), _norm_gradient(dk, k, x.k_inverse_norm)
    for place, gradient in ((q, dq), (k, dk), (x.v, dv), (beta, dbeta)):
        place.copy_(gradient)


def _norm_gradient(dy: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    return dy.addcmul_(y, (y * dy).sum(-1, keepdim=True), value=-1).mul_(inverse)


def step_forward(q, k, v, beta, state, scale, use_l2, state_indices):
    """One token, q and k [B, H, K], v [B, H, V], beta [B, H]; `state` [N, H, K, V] is updated in place. Returns o."""
    dtype = compute_dtype(state.dtype)
    rows = None if state_indices is None else state_indices.long()
    S = (state if rows is None else state.index_select(0, rows.clamp(min=0))).to(dtype)
    o_dtype, (q, k, v, beta) = v.dtype, (x.to(dtype) for x in (q, k, v, beta))
    if use_l2:
        q, k = q * inverse_norm(q), k * inverse_norm(k)
    read = torch.stack([k, q], 2) @ S  # [B, H, 2, V]: the state is read once for both
    v_new = beta[..., None] * (v - read[:, :, 0])
    o = (scale * (read[:, :, 1] + (q * k).sum(-1, keepdim=True) * v_new)).to(o_dtype)
    if rows is None:
        S.addcmul_(k[..., None], v_new[..., None, :])
        if S is not state:
            state.copy_(S)
        return o
    if _are_all_real(rows):
        state.index_copy_(0, rows, S.addcmul_(k[..., None], v_new[..., None, :]).to(state.dtype))
        return o
    write_rows(state, rows, S, S + k[..., None] * v_new[..., None, :])
    return o.masked_fill((rows < 0)[:, None, None], 0)


def _are_all_real(rows: Tensor) -> bool:
    """Whether no row is to be skipped, where a look costs nothing."""
    return rows.device.type == "cpu" and bool((rows >= 0).all())


def write_rows(states: Tensor, rows: Tensor, before: Tensor, after: Tensor) -> None:
    """states[rows] = after, where a row of -1 writes nothing; `before` is states[rows], for it the first state."""
    if _are_all_real(rows):
        states.index_copy_(0, rows, after.to(states.dtype))
        return
    valid = rows >= 0
    values = torch.where(valid.view(-1, *[1] * (after.dim() - 1)), after, before)
    # A row to skip repeats the write of the first row that counts: no host synchronisation, no lost update.
    writer = torch.where(valid, torch.arange(len(rows), device=rows.device), valid.int().argmax())
    states[rows[writer].clamp(min=0)] = values[writer].to(states.dtype)
