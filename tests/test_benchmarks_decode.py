"""The parts of the decoding benchmarks that need no GPU: plans, figures, the result file, the plot, and the drift."""

import json

import pytest
import torch

from deltanet.benchmarks import gpu_decode, state_precision


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_decode, "SHAPES", {"tiny": (2, 16)})
    monkeypatch.setattr(gpu_decode, "device_ms", lambda work, device: (work() is None, 0.002, 1.0)[1:])
    monkeypatch.setattr(gpu_decode, "wall_ms", lambda work, device: 0.05)


def task(**changes):
    return {"part": "steps", "shape": "tiny", "B": 3, "peer": "ours", "state": "float32", **changes}


@pytest.mark.parametrize("part", gpu_decode.PARTS)
def test_tasks_do_not_replace_each_other(part):
    tasks = gpu_decode.plan(part, gpu_decode.PEERS, gpu_decode.SHAPES, gpu_decode.BATCHES)
    keys = [gpu_decode.key(one) for one in tasks]
    assert len(set(keys)) == len(keys) > 0


def test_the_kernels_own_tile_comes_first():
    kernel = pytest.importorskip("deltanet.kernels.decode_kernel")
    for D, tiles in gpu_decode.TILES.items():
        assert tiles[0] == kernel.launch_of(D, D)[:3]


def test_bytes_of_a_step():
    """Counted by hand: states twice, tokens, output, weights of four taps and of the norm once."""
    B, H, D = 3, 2, 16
    layer = gpu_decode.Layer("cpu", B, H, D, torch.float32)
    channels = 3 * H * D
    half = B * channels + B * H * D + B * H + 4 * channels + D + 2 * 3 * B * channels
    assert layer.bytes() == 2 * half + 2 * 4 * B * H * D * D


@pytest.mark.parametrize("state", gpu_decode.STATES)
@pytest.mark.parametrize("peer", ["ours", "composed"])
def test_figures(tiny, peer, state):
    row = gpu_decode.measure(task(peer=peer, state=state), "cpu", bandwidth=1e-3, memory=1)
    layer = gpu_decode.Layer("cpu", 3, 2, 16, getattr(torch, state))
    assert row["floor_us"] == pytest.approx(layer.bytes() / 1e3) and row["device_us"] == 2.0
    assert row["over_floor"] == pytest.approx(2e3 / layer.bytes()) and 0 < row["error"] < 1e-2


def test_a_peer_that_fails_is_a_result(tiny, monkeypatch):
    def broken(layer):
        raise ImportError("no module named fla")

    monkeypatch.setitem(gpu_decode.MAKERS, "fla", broken)
    row = gpu_decode.measure(task(peer="fla"), "cpu", 1.0, 1)
    assert row == {**task(peer="fla"), "failed": "ImportError: no module named fla"}
    assert "no module named fla" in gpu_decode.line(row)


def test_results_are_kept_for_the_same_device_and_replaced_by_key(tmp_path):
    path, settings = tmp_path / "x" / "figures.json", {"device": "a", "date": "1"}
    gpu_decode.write(path, settings, {}, [task(B=1, device_us=1.0), task(B=2, device_us=2.0)])
    gpu_decode.write(path, {**settings, "date": "2"}, {}, [task(B=2, device_us=3.0)])
    data = json.loads(path.read_text())
    assert data["environment"]["date"] == "2" and [row["device_us"] for row in data["rows"]] == [1.0, 3.0]
    gpu_decode.write(path, {"device": "b"}, {}, [task(B=8)])
    assert [row["B"] for row in json.loads(path.read_text())["rows"]] == [8]


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures.json"
    rows = [task(B=B, peer=peer, device_us=5.0 * B, floor_us=B) for B in (1, 8) for peer in ("ours", "composed")]
    gpu_decode.write(path, {"device": "a card"}, {}, rows)
    assert gpu_decode.draw(path).stat().st_size > 10_000
    gpu_decode.write(path, {"device": "another"}, {}, [task(failed="no")])
    with pytest.raises(ValueError, match="has no times to draw"):
        gpu_decode.draw(path)


def test_drift_of_a_rounded_state():
    """float32 stays at its rounding, bfloat16 at its own, and the errors are of the last hundred tokens."""
    cpu, size = torch.device("cpu"), (16,)
    exact = state_precision.measure(cpu, torch.float32, 250, size)
    rounded = state_precision.measure(cpu, torch.bfloat16, 250, size)
    assert [row["tokens"] for row in exact] == [[100, 250]] * 4
    for row, other in zip(exact, rounded):
        assert max(row["output_error"] + row["state_error"]) < 1e-5
        assert all(1e-3 < error < 0.1 for error in other["output_error"] + other["state_error"])
