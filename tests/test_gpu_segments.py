"""What context parallelism asks of the fused kernels, on a GPU against float64."""

import pytest
import segments
from cases import DTYPES, limits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_in_fresh_memory")]
NAMES = pytest.mark.parametrize("dtype", DTYPES)


@NAMES
@pytest.mark.parametrize("B, T, H, D", [(1, 16384, 4, 128), (1, 2000, 16, 128), (4, 1000, 16, 64), (1, 130, 2, 64)])
def test_maps(check, device, dtype, B, T, H, D):
    """Rows cut into many spans, into some, and whole ones."""
    if device.type == "cpu":
        T = min(T, 300)
    actual, expected = segments.maps(device, DTYPES[dtype], B, T, H, D, D)
    forward, *_, gradient = limits(DTYPES[dtype])
    # Little is left of the identity behind thousands of tokens, and it was rounded once a chunk.
    check(actual, expected, [forward, 3 * forward, gradient, gradient], segments.MAPS)


@NAMES
@pytest.mark.parametrize("bounds", [None, [0, 900, 901, 4096], [0, 1024, 2048, 3000], [0, 4096]])
def test_two_halves_are_the_whole(monkeypatch, check, device, dtype, bounds):
    actual, expected = segments.halves(monkeypatch, device, DTYPES[dtype], bounds, 1, 4096, 4, 128, 128)
    forward, *_, gradient = limits(DTYPES[dtype])
    check(actual, expected, [forward, *[gradient] * 4], segments.HALVES)
