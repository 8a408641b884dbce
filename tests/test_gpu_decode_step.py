"""The decoding kernel on a GPU: against float64, inside graphs and the layer, its states, and what it launches.

Fresh memory holds NaN. DELTANET_TEST_DEVICE=cpu tries the tests themselves.
"""

import pytest
import torch
from cases import DTYPES
from decode_cases import RESULTS, Step, limit_of
from models import tiny_model, token_ids
from oracle import relative_error
from transformers import DynamicCache

from deltanet import use_state_dtype
from deltanet.benchmarks import state_precision, timing
from deltanet.kernels import decode_step as module
from deltanet.kernels.decode_step import decode_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_in_fresh_memory")]

DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))
HALF = torch.bfloat16


def step(device, dtype, **options):
    return Step(device, DTYPES.get(dtype, dtype), **{"K": 128, "V": 128, **options})


def compare(check, case: Step):
    """Against float64, and a second run on the same inputs bit for bit the same."""
    before, expected = [x.clone() for x in case.held()], case.expected()
    actual = [x.clone() for x in case.actual()]
    check(actual, expected, limit_of(case), RESULTS)
    for x, y in zip(case.held(), before):
        x.copy_(y)
    assert all(map(torch.equal, case.actual(), actual))
    return actual


def test_the_kernel_runs(cuda, monkeypatch):
    """Otherwise every test here would pass on the composed form."""
    monkeypatch.delenv("DELTANET_BACKEND", raising=False)
    monkeypatch.setattr(module, "composed", None)
    for dtype in (*DTYPES, HALF):
        step(cuda, dtype).actual()
    step(cuda, HALF, K=256, V=256, state_dtype=HALF).actual()


@DTYPE
@pytest.mark.parametrize("K, V", [(16, 16), (64, 64), (128, 128), (256, 256), (100, 24), (24, 300), (192, 17), (64, 1024)])
@pytest.mark.parametrize("B", [1, 7])
def test_sizes(device, check, dtype, K, V, B):
    compare(check, step(device, dtype, B=B, H=3, K=K, V=V))


@DTYPE
@pytest.mark.parametrize(
    "options",
    [{"gate": False}, {"beta": False}, {"beta_scale": 2.0}, {"width": 2}, {"width": 3, "gate": False}, {"width": 8}],
    ids=str,
)
def test_options(device, check, dtype, options):
    compare(check, step(device, dtype, **options))


@DTYPE
@pytest.mark.parametrize("K", [16, 64, 128, 256])
def test_a_state_in_bfloat16(device, check, dtype, K):
    compare(check, step(device, dtype, K=K, V=K, state_dtype=HALF))


@DTYPE
@pytest.mark.parametrize("rows", [[5, -1, 0, 3], [-1, -1, -1, -1]], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows(device, check, dtype, rows, index_dtype):
    case = step(device, dtype, B=4, slots=7, rows=rows)
    case.rows = case.rows.to(index_dtype)
    before = [x.clone() for x in case.held()]
    o = compare(check, case)[0]
    for n in set(range(7)) - set(rows):
        assert all(torch.equal(x[n], y[n]) for x, y in zip(case.held(), before))
    assert not o[torch.tensor(rows) < 0].any()


@DTYPE
def test_many_rows_repeat(device, dtype):
    """Small tiles are held by several threads at once; a race would show among thousands of programs."""
    for K in (16, 32):
        case = step(device, dtype, B=512, H=16, K=K, V=K, width=4)
        before = [x.clone() for x in case.held()]
        first = [x.clone() for x in case.actual()]
        for _ in range(5):
            for x, y in zip(case.held(), before):
                x.copy_(y)
            assert all(map(torch.equal, case.actual(), first))


@DTYPE
def test_the_kernel_is_the_composed_form(device, check, dtype, monkeypatch):
    """300 tokens, the states in place. Sums in another order fall on the other side of a rounding now and then; a rounding
    more or fewer would be seen in every number: 1.6e-3 in bfloat16, 2e-4 in float16."""
    arguments = [step(device, dtype, B=2, seed=seed) for seed in range(300)]
    held, outputs = [[x.clone() for x in arguments[0].held()] for _ in range(2)], []
    for (state, *past), backend in zip(held, ("", "torch")):
        monkeypatch.setenv("DELTANET_BACKEND", backend)
        first = {**arguments[0].arguments, "state": state, "conv_states": past}
        with torch.no_grad():
            outputs.append(torch.stack([decode_step(**{**first, **one.tokens}) for one in arguments]))
    results = [[o, *states] for o, states in zip(outputs, held)]
    limit = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1.5e-4}[dtype]
    check(*results, [limit, limit, 0.0, 0.0, 0.0], RESULTS)


def decode(model, ids, cache):
    parts = [ids[:, :20], *ids[:, 20:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@DTYPE
@pytest.mark.parametrize("options", [{}, {"use_gate": True, "allow_neg_eigval": True, "conv_size": 3}], ids=str)
def test_steps_are_the_chunks_are_the_recurrence(device, dtype, options):
    """512 tokens through a model, against the same weights in float64."""
    options = {"hidden_size": 128, "initializer_range": 0.1, **options}
    exact, ids = tiny_model(**options).double().to(device), token_ids(2, 512).to(device)
    model = tiny_model(**options).to(device, DTYPES[dtype])
    exact.load_state_dict(model.state_dict())
    recurrent = tiny_model(attn_mode="fused_recurrent", **options).to(device, DTYPES[dtype])
    with torch.no_grad():
        expected = exact(ids, use_cache=False).logits
        errors = {"chunked": model(ids, use_cache=False).logits, "recurrent": recurrent(ids, use_cache=False).logits}
        errors["steps"] = decode(model, ids, DynamicCache(config=model.config))
        errors["rounded"] = decode(model, ids, use_state_dtype(DynamicCache(config=model.config), HALF))
    errors = {name: relative_error(logits, expected) for name, logits in errors.items()}
    print(dtype, errors)
    limit = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    assert errors["chunked"] <= limit and errors["recurrent"] <= limit and errors["steps"] <= limit, errors
    assert errors["rounded"] <= 0.1, errors


def test_graph_capture(cuda):
    """Replayed on tokens, rows and states that were not there at capture."""
    case = step(cuda, HALF, B=4, slots=6, rows=[0, 1, 2, 3])
    other = step(cuda, HALF, B=4, slots=6, rows=[5, -1, 2, 0], seed=1)
    case.actual()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o = decode_step(**case.arguments)
    inputs = lambda x: [*x.tokens.values(), *x.held(), *x.conv_weights, x.norm_weight, x.rows]  # noqa: E731
    for x, y in zip(inputs(case), inputs(other)):
        x.copy_(y)
    graph.replay()
    assert all(map(torch.equal, [o, *case.held()], other.actual()))


def test_nothing_waits_for_the_device(cuda, monkeypatch):
    monkeypatch.delenv("DELTANET_CHECK", raising=False)
    case = step(cuda, HALF, B=4, slots=6, rows=[5, -1, 2, 0])
    case.actual()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.actual()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch(cuda):
    torch.use_deterministic_algorithms(False)  # which would fill new memory, a launch of its own
    case = step(cuda, HALF)
    assert timing.device_ms(case.actual, cuda)[1] == 1


def test_another_batch_compiles_nothing(cuda):
    from triton import knobs

    names = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **details: names.append(details["repr"]) and None
        step(cuda, HALF, B=1, K=80, V=48).actual()
        assert len(names) == 1
        for B, slots in ((2, None), (16, None), (33, None)):
            step(cuda, HALF, B=B, slots=slots, K=80, V=48).actual()
        assert len(names) == 1


def test_compile_fullgraph(cuda):
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True)
    for gate in (True, False):
        case, same = (step(cuda, HALF, gate=gate) for _ in range(2))
        with torch.no_grad():
            o = compiled(**case.arguments)
        assert all(map(torch.equal, [o, *case.held()], same.actual()))


def test_a_device_that_is_not_current(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    expected = step(cuda, HALF).actual()
    assert all(torch.equal(x.to(cuda), y) for x, y in zip(step(torch.device("cuda", 1), HALF).actual(), expected))


def test_states_of_more_than_two_to_the_31_elements(cuda):
    """The last slot, and the first, which a wrapped offset would hit."""
    torch.cuda.empty_cache()
    slots = 2**31 // (4 * 128 * 128) + 2
    case = step(cuda, HALF, B=1, H=4, state_dtype=HALF)
    alone = case.actual()
    again = step(cuda, HALF, B=1, H=4, state_dtype=HALF)
    state = torch.empty(slots, *again.state.shape[1:], device=cuda, dtype=HALF)
    state[0], state[-1] = 0, again.state[0]
    past = [torch.cat([x.expand(slots - 1, -1, -1) * 0, x]) for x in again.conv_states]
    again.state, again.conv_states, again.rows = state, past, torch.tensor([slots - 1], device=cuda)
    o, state, *_ = again.actual()
    assert torch.equal(o, alone[0]) and torch.equal(state[-1:], alone[1]) and not state[0].any()


@pytest.mark.parametrize("state_dtype", [torch.float32, HALF])
def test_drift_over_ten_thousand_steps(device, record_property, state_dtype):
    """Bounded by the rounding of the state; how much is in benchmarks/results/state_precision.json."""
    tokens = 10_000 if device.type == "cuda" else 100
    rows = state_precision.measure(device, state_dtype, tokens, sizes=(128,))
    record_property("errors", {f"{row['keys']} x{row['beta_scale']:.0f}": row["output_error"][-1] for row in rows})
    for row in rows:
        assert max(row["output_error"]) <= (1e-4 if state_dtype == torch.float32 else 0.1), row
