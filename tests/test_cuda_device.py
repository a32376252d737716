"""Arrays that live on a GPU, on a GPU: these tests need one, and the others do without."""

from functools import partial

import cudaemu
import numpy as np
import pytest
import test_operators as sentences
import test_streaming
from test_cuda_kernels import CASES
from test_cuda_streams import CASES as STREAMED

import ttr_np
from ttr_np.notation import GATES, draw

pytestmark = [
    pytest.mark.skipif(not cudaemu.ON_GPU, reason="TTR_TESTS_ON=gpu is for machines with a GPU"),
    pytest.mark.filterwarnings("ignore:solver '.*' stopped after"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]


@pytest.fixture
def cupy():
    """CuPy itself."""
    return pytest.importorskip("cupy")


def sent(cupy, arrays):
    return {name: cupy.asarray(x) for name, x in arrays.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_on_the_device_stay_there_and_give_the_same_bits(case, cupy):
    arrays = case.draw(t=9, dtype=np.float32)
    mask = np.arange(9) % 3 > 0
    wanted, end = case(arrays, state=True, mask=mask, cu_seqlens=[0, 4, 9])
    options = {"state": True, "mask": cupy.asarray(mask), "cu_seqlens": cupy.asarray([0, 4, 9])}
    o, state = case(sent(cupy, arrays), **options)
    assert isinstance(o, cupy.ndarray)
    sentences.same_bits(o.get(), wanted)
    for found, field in zip(state, end, strict=True):
        assert (found is None) == (field is None)
        if found is not None:
            sentences.same_bits(found.get(), field)


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule", "softmax_attention", "selective_scan"])
def test_arrays_of_torch_are_taken_where_they_are(operator, cupy):
    torch = pytest.importorskip("torch")
    arrays = draw(operator, np.random.default_rng(0), lead=(2,), t=70, dtype=np.float32)
    wanted = getattr(ttr_np, operator)(**arrays, backend="numpy")
    o = getattr(ttr_np, operator)(**{name: torch.asarray(x, device="cuda") for name, x in arrays.items()})
    assert isinstance(o, cupy.ndarray)
    np.testing.assert_allclose(o.get(), wanted, atol=1e-5 * np.max(np.abs(wanted)), rtol=0)


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule", "softmax_attention"])
def test_a_graph_gives_the_bits_of_the_call_it_recorded(operator, cupy):
    arrays = sent(cupy, draw(operator, np.random.default_rng(0), lead=(2,), t=300, k=32, v=32, dtype=np.float32))
    call = partial(getattr(ttr_np, operator), **arrays, backend="cupy")
    wanted = call().get()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call()
        stream.synchronize()
        stream.begin_capture()
        o = call()
        graph = stream.end_capture()
        o[...] = 0
        graph.launch(stream)
        stream.synchronize()
    sentences.same_bits(o.get(), wanted)


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_a_stream_on_the_device_is_the_stream_on_the_host(case, cupy):
    stream, tokens, _ = test_streaming.streamed(case, dtype=np.float32)
    other, *_ = test_streaming.streamed(case, dtype=np.float32)
    tokens = {name: x.astype(np.float32) if name in GATES else x for name, x in tokens.items()}
    host = [{name: np.ascontiguousarray(x[i]) for name, x in tokens.items()} for i in range(3)]
    out = cupy.empty_like(cupy.asarray(other(**host[0])))
    for i, token in enumerate(host):
        wanted = other(**token) if i else None
        assert stream(**sent(cupy, token), out=out) is out
        if wanted is not None:
            sentences.same_bits(out.get(), wanted)
