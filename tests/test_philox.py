from __future__ import annotations

import math

import pytest
import torch

from penstock.kernels.philox import gumbel, philox4x32

# kat_vectors of Random123, "philox4x32 10": counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor(word, dtype=torch.int64) for word in counter)
    return tuple(int(word) for word in philox4x32(key, (c0, c1, c2, c3)))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_words_are_those_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert words(counter, key) == expected


def test_counters_broadcast_to_the_same_words_as_one_by_one() -> None:
    key = (0xDEADBEEF, 0x12345678)
    zero = torch.zeros((), dtype=torch.int64)
    columns, rows = torch.arange(5)[None, :], torch.arange(2**32 - 3, 2**32)[:, None]
    together = torch.stack(torch.broadcast_tensors(*philox4x32(key, (columns, rows, zero + 7, zero))), dim=-1)
    assert together.shape == (3, 5, 4)
    for i, row in enumerate(rows.flatten().tolist()):
        for j in range(5):
            assert tuple(together[i, j].tolist()) == words((j, row, 7, 0), key)


def test_noise_is_the_stated_function_of_philox() -> None:
    # Independent of how ids are batched: word (id mod 4) of counter (id div 4, position, choice, 0) under the seed
    seed, choice, position = (5 << 32) | 9, 3, 1234
    noise = gumbel(seed, choice, position, torch.arange(64))
    for token in (0, 1, 5, 30, 63):
        word = words((token // 4, position, choice, 0), (9, 5))[token % 4]
        uniform = ((word >> 9) + 0.5) / 2**23
        assert noise[token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-5, abs=1e-6)


def test_noise_is_pure_and_depends_on_every_argument() -> None:
    ids = torch.arange(200)
    base = gumbel(11, 0, 40, ids)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(base, gumbel(11, 0, 40, ids))
    assert base.dtype == torch.float32
    others = [(12, 0, 40), (11 + (1 << 32), 0, 40), (11, 1, 40), (11, 0, 41), (2**63 - 1, 0, 40)]
    for seed, choice, position in others:
        other = gumbel(seed, choice, position, ids)
        assert (other == base).sum() < 5, (seed, choice, position)


@pytest.mark.parametrize(
    "ids",
    [[0], [3], [4], [255], [7, 6, 5], [250, 3, 99, 3], list(range(13, 40)), [9_001, 12]],
)
def test_noise_of_a_token_does_not_depend_on_the_others_asked_for(ids: list[int]) -> None:
    every = gumbel(2**40 + 3, 2, 17, torch.arange(max(ids) + 1))
    assert torch.equal(gumbel(2**40 + 3, 2, 17, torch.tensor(ids)), every[torch.tensor(ids)])


def test_noise_is_gumbel_finite_and_uncorrelated() -> None:
    from scipy import stats

    noise = torch.stack([gumbel(123, 0, position, torch.arange(20_000)) for position in range(5)])
    assert torch.isfinite(noise).all()
    flat = noise.flatten().double().numpy()
    euler = 0.5772156649
    error = math.sqrt(math.pi**2 / 6 / flat.size)
    assert abs(flat.mean() - euler) < 4 * error
    assert flat.var() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert stats.kstest(flat, "gumbel_r").pvalue > 1e-3
    for a, b in [(noise[0], noise[1]), (noise[0, :-1], noise[0, 1:]), (noise[2, ::2], noise[2, 1::2])]:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("word", [0, 0x1FF, 0xFFFFFFFF])
def test_the_extreme_words_give_finite_noise(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(key: object, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full_like(counter[0], word) for _ in range(4))

    monkeypatch.setattr("penstock.kernels.philox.philox4x32", constant)
    assert torch.isfinite(gumbel(0, 0, 0, torch.arange(8))).all()
