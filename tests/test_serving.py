"""The part of the vLLM plugin that needs no vLLM: the recurrence over slots, and what a wrong vLLM is told."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from models import tiny_config, tiny_model
from transformers import AutoConfig

from deltanet import DeltaNetConfig
from deltanet.kernels.decode_step import decode_step
from deltanet.layout_deltanet import TokenLayout
from deltanet.mixer_deltanet import DeltaNetMixer
from deltanet.serving import plugin, recurrence
from deltanet.serving.recurrence import NULL_SLOT, Recurrence

OPTIONS = [
    {},
    {"expand_k": 0.5, "expand_v": 2.0, "allow_neg_eigval": True, "use_gate": True},
    {"use_beta": False, "conv_size": 3},
    {"use_short_conv": False, "use_gate": True},
    {"use_short_conv": False, "qk_activation": "identity"},
    {"qk_activation": "elu", "qk_norm": "sum", "use_beta": False},
    {"qk_activation": "relu", "conv_size": 2, "attn_mode": "fused_recurrent"},
]
SLOTS = 9


class Requests:
    """What the layer of the model says to a batch of sequences, and what the recurrence says to their tokens."""

    def __init__(self, options, lengths):
        torch.manual_seed(0)
        self.mixer = DeltaNetMixer(tiny_config(**options), 0).eval().requires_grad_(False)
        for parameter in self.mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        self.recurrence = Recurrence(tiny_config(**options), 2)
        self.inputs = [torch.randn(length, 32) for length in lengths]
        self.outputs = [[] for _ in lengths]
        # As vLLM lays them out: a page of bytes for each slot, and what other requests left in them.
        shapes = self.recurrence.state_shapes
        sizes = [4 * torch.Size(shape).numel() for shape in shapes]
        pages = torch.full((SLOTS, sum(sizes) + 64), 0xFF, dtype=torch.uint8)
        views = [part.view(torch.float32) for part in pages[:, : sum(sizes)].split(sizes, 1)]
        self.states = tuple(view.view(SLOTS, *shape) for view, shape in zip(views, shapes))
        assert all(state.isnan().all() for state in self.states)

    def expected(self):
        seen = []
        with self.mixer.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0])):
            for x in self.inputs:
                self.mixer(x[None], TokenLayout())
        return seen

    def project(self, x):
        mixer = self.mixer
        qkv = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
        b, gate = mixer.b_proj(x) if mixer.use_beta else None, mixer.g_proj(x) if mixer.use_gate else None
        return qkv, b, gate, self.weight(), mixer.o_norm

    def weight(self):
        if not self.mixer.use_short_conv:
            return None
        return torch.cat([self.mixer.q_conv1d.weight, self.mixer.k_conv1d.weight, self.mixer.v_conv1d.weight])

    def advance(self, step, slots):
        """`step` is {request: new tokens}; a single token of a request that has begun is decoded, the rest is prefilled."""
        begun = {i: sum(map(len, self.outputs[i])) for i in step}
        decoding = [i for i in step if begun[i] and step[i] == 1]
        for group in (decoding, [i for i in step if i not in decoding]):
            if not group:
                continue
            x = torch.cat([self.inputs[i][begun[i] : begun[i] + step[i]] for i in group])
            where = torch.tensor([slots[i] for i in group], dtype=torch.int32)
            if group is decoding:
                o = self.recurrence.decode(*self.project(x), self.states, where)
            else:
                bounds = torch.tensor([0, *(step[i] for i in group)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                known = torch.tensor([begun[i] > 0 for i in group])
                o = self.recurrence.prefill(*self.project(x), self.states, where, known, bounds)
            for i, part in zip(group, o.split([step[i] for i in group])):
                self.outputs[i].append(part)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_schedule_of_tokens_gives_what_the_layer_gives(options):
    numbers, lengths = random.Random(0), [1, 2, 40, 70, 9, 130]
    requests, slots = Requests(options, lengths), [3, 1, 8, 2, 5, 7]
    rest = dict(enumerate(lengths))
    while any(rest.values()):
        running = [i for i in rest if rest[i] and numbers.random() < 0.7]
        step = {i: min(rest[i], numbers.choice([1, 1, 1, 5, 33])) for i in running}
        requests.advance(step, slots)
        for i, count in step.items():
            rest[i] -= count
    for o, expected in zip(requests.outputs, requests.expected()):
        torch.testing.assert_close(torch.cat(o), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_the_fused_step_takes_slots_as_a_server_lays_them_out(monkeypatch, options):
    """Where the kernel did not take them, the interpreter's processes would raise an error."""
    pytest.importorskip("triton")
    calls = []
    monkeypatch.setattr(recurrence, "decode_step", lambda *x, **y: calls.append(1) or decode_step(*x, **y))
    requests, slots = Requests(options, [6, 4]), [4, 2]
    for step in ({0: 3, 1: 2}, {0: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}):
        requests.advance(step, slots)
    assert len(calls) == 3
    for o, expected in zip(requests.outputs, requests.expected()):
        torch.testing.assert_close(torch.cat(o), expected, atol=1e-5, rtol=1e-5)


def test_rows_that_fill_up_a_graph_change_no_state():
    requests = Requests({}, [4, 4])
    requests.advance({0: 3, 1: 3}, [1, 2])
    before = [state.clone() for state in requests.states]
    x = torch.randn(3, 32)
    slots = torch.tensor([2, NULL_SLOT, NULL_SLOT])
    o = requests.recurrence.decode(*requests.project(x), requests.states, slots)
    assert not o[0].isnan().any() and (o[1:] == 0).all()
    untouched = [i for i in range(SLOTS) if i not in (NULL_SLOT, 2)]
    for state, old in zip(requests.states, before):
        torch.testing.assert_close(state[untouched], old[untouched], rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(state[2], old[2])


def test_bfloat16_states_lose_only_their_rounding():
    requests, lengths = Requests({}, [60]), [60]
    requests.states = tuple(torch.zeros(state.shape, dtype=torch.bfloat16) for state in requests.states)
    for _ in range(lengths[0]):
        requests.advance({0: 1}, [1])
    error = torch.cat(requests.outputs[0]) - requests.expected()[0]
    assert 1e-4 < error.norm() / requests.expected()[0].norm() < 0.05


@pytest.fixture
def auto_config():
    """Takes back what the plugin registers."""
    yield
    AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig, exist_ok=True)


@pytest.mark.parametrize("version", ["0.11.2", "0.31.9", "0.33.0", "1.0.0"])
def test_a_vllm_outside_the_range_is_refused_when_a_checkpoint_is_read(monkeypatch, auto_config, tmp_path, version):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    plugin.register()  # also called where other models are served, and says nothing there
    with pytest.raises(RuntimeError, match=f"vLLM >=0.32,<0.33, and vLLM {version} is installed"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.1.dev7+gabcdef.cpu"])
def test_versions_inside_the_range_are_accepted(version):
    assert plugin.version_refusal(version) == ""


def test_a_configuration_of_2024_is_read_for_serving(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))
    fields = {**tiny_config().to_dict(), "norm_first": True}
    config = plugin.ServedConfig.from_dict(fields)
    assert type(config) is DeltaNetConfig and config.hidden_size == 32
