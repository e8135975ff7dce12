"""Codecs: what they are off by, what they weigh, and what they refuse; and what a client keeps on its disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays
from torch import Tensor

from atm_fl import codecs
from atm_fl.codecs import CODECS, Arrays, Codec, make_codec, size_of
from atm_fl.errors import SettingError
from atm_fl.federation.client_state import ClientState
from atm_fl.vectors import Layout, blocks, digest

ALL = [*CODECS, "int8:2", "int4:6", "topk:0.001", "topk:0.3", "topk:1", "low-rank:1", "low-rank:3"]
MOST = float(torch.finfo(torch.float32).max)


def flat(size: int) -> Layout:
    return Layout(("all",), ((size,),))


def trip(text: str, vector: Tensor, layout: Layout | None = None, seed: int = 0) -> Tensor:
    """What arrives; the vector that is sent must stay as it is."""
    codec, layout, before = make_codec(text), layout or flat(len(vector)), digest(vector)
    arrived = codec.decode(codec.encode(vector, layout, seed), layout)
    assert digest(vector) == before
    return arrived


def task_vector(layout: Layout, scale: float = 1e-4) -> Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(layout.size)) * scale


MATRICES = Layout(
    ("wide", "bias", "kernel", "none", "scalar", "tall", "thin"),
    ((40, 90), (40,), (32, 3, 4, 4), (0, 5), (), (70, 30), (1, 9)),
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ends = st.sampled_from([0.0, MOST, -MOST, 1e-45, -1e-45, 1e-38])
kinds = st.one_of(finite, ends, st.floats(-1, 1, width=32))
vectors_ = st.integers(1, 90).flatmap(lambda n: numpy_arrays(np.float32, n, elements=kinds)).map(torch.from_numpy)


@pytest.mark.parametrize("text", ALL)
@settings(max_examples=60, deadline=None)
@given(vector=vectors_, rows=st.integers(1, 5))
def test_every_finite_vector_arrives_finite_and_again_the_same(text: str, vector: Tensor, rows: int) -> None:
    """Zeros, huge and subnormal elements, one element, parts of a block, empty entries, matrices."""
    size = len(vector)
    matrix = rows, size // rows
    layout = Layout(("a", "none", "matrix"), ((size - math.prod(matrix),), (0, 3), matrix))
    one, other = trip(text, vector, layout, 3), trip(text, vector, layout, 3)
    assert one.dtype == torch.float32
    assert one.shape == vector.shape
    assert torch.equal(one, other)
    largest = vector.abs().max().double()
    if not text.startswith("low-rank"):
        assert ((one.double() - vector.double()).abs() <= largest * (1 + 1e-3)).all()
        assert (one[vector == 0] == 0).all()


@given(vector=vectors_)
def test_fp32_is_the_vector_itself_and_shares_its_memory(vector: Tensor) -> None:
    arrived = trip("fp32", vector)
    assert digest(arrived) == digest(vector)
    assert arrived.data_ptr() == vector.data_ptr()


@given(vector=vectors_)
def test_fp16_is_off_by_half_a_unit_in_the_eleventh_bit(vector: Tensor) -> None:
    arrived, exact = trip("fp16", vector).double(), vector.double()
    largest = float(exact.abs().max())
    lift = codecs.exponent(vector, 15)
    least = 2.0 ** -(25 + lift)  # half the smallest subnormal number of half precision, lowered again
    assert ((arrived - exact).abs() <= torch.clamp(exact.abs() * 2.0**-11, min=least)).all()
    assert largest == 0 or least <= max(largest * 2.0**-39, 2.0**-150)


@given(vector=vectors_)
def test_bf16_rounds_as_torch_does_and_never_to_infinity(vector: Tensor) -> None:
    expected = vector.bfloat16().float()
    expected[expected.isinf()] = torch.finfo(torch.bfloat16).max * vector.sign()[expected.isinf()]
    assert torch.equal(trip("bf16", vector), expected)


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("nearest", [True, False])
@settings(max_examples=60, deadline=None)
@given(vector=vectors_, block=st.sampled_from([2, 6, 16, 256]))
def test_integers_are_off_by_half_a_step_or_one(
    name: str, levels: int, nearest: bool, vector: Tensor, block: int
) -> None:
    arrived = trip(f"{name}{'-nearest' * nearest}:{block}", vector, seed=5).double()
    for start in range(0, len(vector), block):
        exact = vector[start : start + block].double()
        largest = exact.abs().max()
        bound = largest / levels * (0.5 if nearest else 1)
        off = (arrived[start : start + block] - exact).abs()
        assert (off <= bound * (1 + 1e-4) + largest * 2e-7 + 2.0**-149).all()
        assert off[exact.abs() == largest].max() <= largest * 2e-7 + 2.0**-149


@pytest.mark.parametrize(("name", "levels", "block"), [("int8", 127, 256), ("int4", 7, 64)])
def test_rounding_at_random_is_unbiased_and_seeded(name: str, levels: int, block: int) -> None:
    """The mean of k trips lies within five standard errors, of which a step's half is the most that one can be."""
    vector, count = task_vector(flat(1000)), 400
    trips = torch.stack([trip(name, vector, seed=seed).double() for seed in range(count)])
    largest = torch.nn.functional.pad(vector.abs(), (0, -1000 % block)).view(-1, block).amax(1)
    step = (largest / levels).repeat_interleave(block)[:1000].double()
    assert ((trips.mean(0) - vector.double()).abs() <= 5 * step / 2 / count**0.5).all()
    assert abs(float(((trips.mean(0) - vector.double()) / step).mean())) < 5 / 2 / (count * 1000) ** 0.5
    assert not torch.equal(trips[0], trips[1])
    rounded = trip(f"{name}-nearest", vector).double()
    assert float((rounded - vector).norm()) < float((trips[0] - vector).norm())


@settings(max_examples=60, deadline=None)
@given(vector=vectors_, block=st.sampled_from([2, 6, 256]))
def test_ternary_is_the_equations_of_ternary_weight_networks(vector: Tensor, block: int) -> None:
    arrived = trip(f"ternary:{block}", vector).tolist()
    for start in range(0, len(vector), block):
        exact = vector[start : start + block].tolist()
        # What a block lacks counts as zeros.
        threshold = 0.7 * math.fsum(map(abs, exact)) / block
        large = [abs(value) for value in exact if abs(value) > threshold * (1 + 1e-12)]
        close = any(threshold and abs(abs(value) / threshold - 1) < 1e-9 for value in exact)
        if not close:
            size = math.fsum(large) / len(large) if large else 0.0
            wanted = [math.copysign(size, value) if abs(value) > threshold else 0.0 for value in exact]
            assert arrived[start : start + block] == pytest.approx(wanted, rel=1e-6, abs=2.0**-149)


def test_ternary_loses_a_fifth_of_a_bell_curve() -> None:
    vector = task_vector(flat(100_000))
    assert float((trip("ternary", vector) - vector).norm() ** 2 / vector.norm() ** 2) == pytest.approx(0.19, abs=0.01)


@settings(max_examples=100, deadline=None)
@given(vector=vectors_, density=st.floats(0.001, 1))
def test_topk_keeps_exactly_the_k_largest_and_of_equal_ones_the_first(vector: Tensor, density: float) -> None:
    count = min(len(vector), max(1, round(density * len(vector))))
    expected = sorted(range(len(vector)), key=lambda i: (-abs(float(vector[i])), i))[:count]
    assert codecs.largest_elements(vector, count).tolist() == sorted(expected)
    arrived = trip(f"topk:{density!r}", vector)
    rest = torch.ones(len(vector), dtype=torch.bool)
    rest[expected] = False
    assert not arrived[rest].any()
    assert torch.equal(arrived[expected], trip("fp16", vector[expected]))


def test_topk_of_a_long_vector() -> None:
    vector = task_vector(flat(700_001))
    arrived = trip("topk:0.01", vector)
    expected = vector.abs().topk(7000).indices
    assert set(arrived.nonzero().flatten().tolist()) == set(expected.tolist())


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 3000))
def test_positions_come_back_in_the_least_bytes(data: Any, size: int) -> None:
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=60))), np.int64)
    packed = codecs.pack_positions(positions, size)
    assert codecs.unpack_positions(packed, size, len(positions)).tolist() == positions.tolist()
    gaps = np.diff(positions, prepend=-1) - 1
    choices = [int((gaps // 255 + 1).sum()), 2 * int((gaps // 65535 + 1).sum()), math.ceil(size / 8)]
    assert size_of(packed) == min(choices)


def test_positions_with_gaps_of_more_than_sixteen_bits() -> None:
    for positions in ([0, 70_000, 70_001, 300_000], [131_070], [65_535 * 2 + 1]):
        packed = codecs.pack_positions(np.array(positions), 300_001)
        assert packed["gaps"].dtype == np.uint16
        assert codecs.unpack_positions(packed, 300_001, len(positions)).tolist() == positions


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_is_the_truncated_svd_of_every_matrix_and_fp16_of_the_rest(rank: int) -> None:
    vector = task_vector(MATRICES)
    arrived, given_ = MATRICES.views(trip(f"low-rank:{rank}", vector, MATRICES)), MATRICES.views(vector)
    for name, entry in given_.items():
        if name in ("wide", "kernel", "tall"):
            matrix = entry.reshape(entry.shape[0], -1).double()
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            expected = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(entry.shape)
        else:
            expected = entry.double()
        assert float((arrived[name] - expected).norm()) <= 2e-3 * float(expected.norm())


def test_low_rank_sends_a_matrix_of_that_rank_whole() -> None:
    factors = torch.randn(40, 2), torch.randn(2, 90)
    vector, layout = (factors[0] @ factors[1]).flatten() * 1e-4, Layout(("a",), ((40, 90),))
    largest = float(vector.abs().max())
    torch.testing.assert_close(trip("low-rank:2", vector, layout), vector, rtol=0, atol=2e-3 * largest)


SIZES: dict[str, Callable[[int], int]] = {
    "fp32": lambda n: 4 * n,
    "fp16": lambda n: 2 * n + 2,
    "bf16": lambda n: 2 * n,
    "topk:0.5": lambda n: 2 * round(n / 2) + 2 + math.ceil(n / 8),
}


@pytest.mark.parametrize("text", SIZES)
@pytest.mark.parametrize("size", [1000, 1001, 4096])
def test_bytes_by_formula(text: str, size: int) -> None:
    assert size_of(make_codec(text).encode(task_vector(flat(size)), flat(size))) == SIZES[text](size)


@pytest.mark.parametrize(
    ("text", "count", "blocks"),
    [
        *[("int8", 1001, 4), ("int8:64", 1001, 16), ("int4", 501, 16), ("int4-nearest:32", 501, 32)],
        *[("ternary", 201, 4), ("ternary:64", 201, 16)],
    ],
)
def test_whole_numbers_are_squeezed_bytes_and_largest_magnitudes(text: str, count: int, blocks: int) -> None:
    arrays = make_codec(text).encode(task_vector(flat(1001)), flat(1001))
    assert zstandard.frame_content_size(arrays["values"]) == count
    assert arrays["largest"].nbytes == 4 * blocks


@pytest.mark.parametrize(
    ("text", "less"), [("int8", 4), ("int8-nearest", 4), ("int4", 7.5), ("int4-nearest", 7.5), ("ternary", 18)]
)
def test_squeezing_comes_near_the_numbers_entropy(text: str, less: float) -> None:
    size = 400_000
    layout, vector = flat(size), torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-4
    arrays = make_codec(text).encode(vector, layout)
    sent = np.frombuffer(zstandard.ZstdDecompressor().decompress(arrays["values"]), np.uint8)
    shares = np.bincount(sent)[np.bincount(sent) > 0] / len(sent)
    assert arrays["values"].nbytes == pytest.approx(-(shares * np.log2(shares)).sum() / 8 * len(sent), rel=0.02)
    # as wire.md promises of int8: what goes with the blocks included, a quarter of fp32's bytes
    assert size_of(arrays) < vector.nbytes / less


@pytest.mark.parametrize("text", ["int8", "int4", "ternary"])
def test_damaged_frames_are_refused(text: str) -> None:
    codec = make_codec(text)
    arrays = codec.encode(task_vector(MATRICES), MATRICES)
    frame = arrays["values"]
    claims_more = np.frombuffer(zstandard.compress(bytes(10**6)), np.uint8)
    streamed = zstandard.ZstdCompressor().compressobj()  # a frame that does not say how much is in it
    unknown = np.frombuffer(streamed.compress(bytes(10)) + streamed.flush(), np.uint8)
    for wrong in (frame[:-1], frame[: len(frame) // 2], frame[:0], frame[4:], claims_more, unknown):
        with pytest.raises(ValueError, match="where"):
            codec.decode(arrays | {"values": wrong}, MATRICES)


def test_bytes_of_low_rank_by_formula() -> None:
    sent = 3 * ((40 + 90) + (32 + 48) + (70 + 30)) + 40 + 0 + 1 + 9
    assert size_of(make_codec("low-rank:3").encode(task_vector(MATRICES), MATRICES)) == 2 * sent + 2


@pytest.mark.parametrize("text", [text for text in ALL if make_codec(text).error_feedback])
def test_with_feedback_nothing_is_lost_for_good(text: str) -> None:
    """What has arrived after some rounds, and the residual, are what was sent."""
    codec, residual = make_codec(text), torch.zeros(MATRICES.size)
    sent, arrived = torch.zeros(MATRICES.size, dtype=torch.float64), torch.zeros(MATRICES.size, dtype=torch.float64)
    for number in range(12):
        vector = torch.randn(MATRICES.size, generator=torch.Generator().manual_seed(number)) * 1e-3
        sent += vector
        vector += residual
        decoded = codec.decode(codec.encode(vector, MATRICES, number), MATRICES)
        arrived += decoded
        residual = vector - decoded
    torch.testing.assert_close(arrived + residual, sent, rtol=0, atol=12 * 2.0**-23 * 0.1)


def test_decoding_does_not_depend_on_threads() -> None:
    vector = task_vector(Layout(("a",), ((400, 300),)))
    layout = Layout(("a",), ((400, 300),))
    for text in ALL:
        encoded = make_codec(text).encode(vector, layout)
        actual = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            actual.append(digest(make_codec(text).decode({k: v.copy() for k, v in encoded.items()}, layout)))
        assert actual[0] == actual[1]


def spoilt(arrays: Arrays, how: str) -> Arrays:
    """Arrays with one thing wrong."""
    name = next(iter(arrays))
    values = arrays[name].copy()
    if how == "longer":
        return arrays | {name: np.append(values, values[:1])}
    if how == "other dtype":
        return arrays | {name: values.astype(np.float64)}
    if how == "two dimensions":
        return arrays | {name: values[None]}
    if how == "one too many":
        return arrays | {"more": values}
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize("how", ["longer", "other dtype", "two dimensions", "one too many", "one missing"])
@pytest.mark.parametrize("text", [*CODECS, "topk:0.3"])
def test_arrays_that_no_encoder_makes_are_refused(text: str, how: str) -> None:
    codec = make_codec(text)
    arrays = codec.encode(task_vector(MATRICES), MATRICES)
    with pytest.raises(ValueError, match=r"where (codec|float|int|uint|a frame).*|where gaps"):
        codec.decode(spoilt(arrays, how), MATRICES)


@pytest.mark.parametrize(
    ("text", "change", "words"),
    [
        ("fp32", {"values": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ("fp32", {"values": np.zeros(4, np.float32)}, r"float32\[4\] where float32\[3\] was expected"),
        ("fp16", {"values": np.array([0, np.inf, 0], np.float16)}, "not finite"),
        ("fp16", {"exponent": np.array([127], np.int16)}, "exponent 127, not one from -126 to 126"),
        ("bf16", {"values": np.full(3, 0x7F80, np.int16)}, "not finite"),
        ("int8", {"largest": np.array([np.inf], np.float32)}, "not finite"),
        ("int4", {"largest": np.array([np.nan], np.float32)}, "not finite"),
        (
            "ternary",
            {"values": codecs.entropy_encode(torch.tensor([243], dtype=torch.uint8))},
            "a byte of 243, which is no five",
        ),
        ("topk:0.3", {"bitmap": np.array([0b00010000], np.uint8)}, "positions that are not 1 below 3"),
        ("topk:0.3", {"bitmap": np.array([0b11000000], np.uint8)}, "positions that are not 1 below 3"),
        ("topk:0.3", {"gaps": np.array([0], np.uint8)}, "where gaps uint8 or uint16, or a bitmap uint8 were expected"),
        ("topk:0.3", {"bitmap": np.array([[1]], np.uint8)}, "where gaps uint8"),
        ("low-rank", {"values": np.array([0, np.nan, 0], np.float16)}, "not finite"),
    ],
)
def test_values_that_no_encoder_makes_are_refused(text: str, change: Arrays, words: str) -> None:
    codec = make_codec(text)
    good = codec.encode(torch.tensor([1.0, -2.0, 3.0]), flat(3)) | {"bitmap": np.array([32], np.uint8)}
    good = {name: array for name, array in good.items() if name != "gaps" and (name != "bitmap" or "topk" in text)}
    codec.decode(good, flat(3))
    with pytest.raises(ValueError, match=words):
        codec.decode(good | change, flat(3))


@pytest.mark.parametrize(("gaps", "size"), [([255], 300), ([3, 255], 300), ([200], 200), ([1, 2], 300), ([], 300)])
def test_gaps_that_lead_nowhere_are_refused(gaps: list[int], size: int) -> None:
    with pytest.raises(ValueError, match=f"positions that are (not 1 below {size}|cut off)"):
        codecs.unpack_positions({"gaps": np.array(gaps, np.uint8)}, size, 1)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_is_not_sent(text: str, value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        make_codec(text).encode(torch.tensor([0.0, value]), flat(2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp61", "codec-up='fp61': codec 'fp61' is unknown; did you mean 'fp16'"),
        ("fp16:3", "codec-up='fp16:3': codec 'fp16' takes no options; write codec-up='fp16'"),
        ("int8:x", "codec-up='int8:x': block='x': it must be a whole number"),
        ("int8:0", "codec-up='int8:0': block=0: it must be at least 2"),
        ("int4:7", "even number"),
        ("topk:density=2", "codec-up='topk:density=2': density=2: it must be above 0 and at most 1"),
        ("topk:", "codec-up='topk:': density='': it must be a finite number"),
        ("topk:nan", "must be a finite number"),
        ("low-rank:0", "rank=0: it must be at least 1"),
    ],
)
def test_codecs_that_cannot_be_are_named(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make_codec(text, "codec-up")


@pytest.mark.parametrize("text", ALL)
def test_a_vector_in_pieces_is_the_whole_one_and_can_be_added(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, vector, base = make_codec(text), task_vector(MATRICES), torch.randn(MATRICES.size)
    whole = codec.encode(vector, MATRICES, 3)
    expected = codec.decode(whole, MATRICES)
    monkeypatch.setattr("atm_fl.codecs.integers.BLOCK", 512)
    monkeypatch.setattr(blocks, "BLOCK", 512)
    pieces = codec.encode(vector, MATRICES, 3)
    assert all(np.array_equal(pieces[name], array) for name, array in whole.items())
    room = torch.full((MATRICES.size,), math.nan)
    assert digest(codec.decode(pieces, MATRICES)) == digest(codec.decode(pieces, MATRICES, room)) == digest(expected)
    moved = base.clone()
    codec.add(pieces, MATRICES, moved)
    assert torch.equal(moved, base + expected)


def test_numbers_and_defaults() -> None:
    made: list[Codec] = [make_codec(text) for text in ("int8", "int8:64", "topk:0.2", "low-rank:4")]
    assert made == [codecs.Int8(), codecs.Int8(block=64), codecs.TopK(density=0.2), codecs.LowRank(rank=4)]


RUN = "0123456789abcdef"


def test_a_client_keeps_one_base_by_its_digest() -> None:
    kept, base = ClientState(RUN, "one-base"), torch.randn(50)
    assert kept.base("a") is None
    kept.save_base(base, "a")
    actual = kept.base("a")
    assert actual is not None
    assert torch.equal(actual, base)
    actual = kept.base("a")  # out of the file this time
    assert actual is not None
    assert torch.equal(actual, base)
    assert kept.base("b") is None
    kept.save_base(base, "b")
    assert kept.base("a") is None
    kept.drop_base()
    kept.drop_base()
    assert kept.base("b") is None


def test_the_base_in_memory_is_given_away_once_and_counts_only_with_its_file() -> None:
    """A client adds the next step to it in place, and another process may have gone on with the file."""
    mine, other = ClientState(RUN, "mine"), ClientState(RUN, "other")
    mine.save_base(torch.ones(300), "a")
    first, second = mine.base("a"), mine.base("a")
    assert first is not None
    assert second is not None
    first.zero_()
    assert torch.equal(second, torch.ones(300))
    mine.save_base(first, "b")
    assert other.base("b") is None
    mine.save_base(first, "b")
    (mine.folder / "base.safetensors").unlink()
    assert mine.base("b") is None


def test_a_client_keeps_the_residuals_of_three_rounds_and_forgets_an_abandoned_future() -> None:
    kept = ClientState(RUN, "residuals")
    for number in (1, 2, 4, 5):
        kept.save("residual", {"vector": torch.full((3,), float(number))}, number)

    def before(number: int) -> float | None:
        actual = kept.last("residual", number)
        return None if actual is None else float(actual["vector"][0])

    assert [before(number) for number in range(1, 7)] == [None, None, 2, 2, 4, 5]
    kept.save("residual", {"vector": torch.zeros(3)}, 3)
    assert [before(number) for number in range(3, 7)] == [2, 0, 0, 0]


def test_damaged_files_are_as_if_they_were_not_there() -> None:
    kept = ClientState(RUN, "damaged")
    kept.save("residual", {"vector": torch.ones(300)}, 1)
    kept.save_base(torch.ones(300), "a")
    residual, base = kept.folder / "residual-00001.safetensors", kept.folder / "base.safetensors"
    flip(residual)
    assert kept.last("residual", 2) is None
    base.write_bytes(base.read_bytes()[:200])
    assert kept.base("a") is None
    residual.write_bytes(b"")
    assert kept.last("residual", 2) is None


def flip(path: Path) -> None:
    """Change one bit of a file's last bytes."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("run", ["", "../../etc", "0123456789ABCDEF", "0123456789abcdef0"])
def test_a_run_that_is_no_id_makes_no_path(run: str) -> None:
    with pytest.raises(ValueError, match="is not the id of a run"):
        ClientState(run, "task")
