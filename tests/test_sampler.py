from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.philox import MAX_GUMBEL, gumbel, philox4x32
from penstock.workers.plan import RequestPlan
from penstock.workers.sampler import accept, filter_logits, sample
from penstock.workers.sampling_params import TokenSampling

NUM_DRAWS = 24_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, 1.0, -3.0, 0.7, 1.9, -0.4, 0.2, 1.1])
SETTINGS = [
    TokenSampling(temperature=1.0),
    TokenSampling(temperature=0.6),
    TokenSampling(temperature=1.7, top_k=5),
    TokenSampling(temperature=1.0, top_p=0.8),
    TokenSampling(temperature=1.0, min_p=0.3),
    TokenSampling(temperature=1.3, top_k=8, top_p=0.9, min_p=0.1),
]


def expected_filter(logits: torch.Tensor, sampling: TokenSampling) -> np.ndarray:
    """What each option says, one token at a time and in f64."""
    scaled = logits.double().numpy() / sampling.temperature
    order = sorted(range(len(scaled)), key=lambda v: (-scaled[v], v))
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = np.exp(scaled[order] - scaled[order[0]])
    mass /= mass.sum()
    kept = [v for i, v in enumerate(order) if i == 0 or sampling.top_p == 1 or mass[:i].sum() < sampling.top_p]
    kept = [v for v in kept if np.exp(scaled[v] - scaled[order[0]]) >= sampling.min_p]
    result = np.full(len(scaled), -np.inf)
    result[kept] = scaled[kept]
    return result


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.9])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 1000])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (0.35, 0.0), (1.0, 0.2), (0.8, 0.05)])
def test_filter_keeps_what_its_options_say(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    sampling = TokenSampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for draw in range(3):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(draw)) * 2
        torch.testing.assert_close(
            filter_logits(logits[None], [sampling])[0].double().numpy(),
            expected_filter(logits, sampling),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("top_k", [0, 9])
@pytest.mark.parametrize("top_p", [1.0, 0.85])
@pytest.mark.parametrize("min_p", [0.0, 0.15])
def test_filter_agrees_with_transformers(top_k: int, top_p: float, min_p: float) -> None:
    from transformers.generation import logits_process as hf

    warpers = [hf.TemperatureLogitsWarper(0.7)]
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(min_p)] if min_p else []
    logits = torch.randn(6, 80, generator=torch.Generator().manual_seed(3)) * 2
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    sampling = TokenSampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(filter_logits(logits, [sampling] * len(logits)), scores)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (TokenSampling(temperature=1.0, top_k=2), [1, 2]),
        (TokenSampling(temperature=1.0, top_k=1), [1]),
        # four equal tokens carry nearly all mass: .25, .5, .75
        (TokenSampling(temperature=1.0, top_p=0.4), [1, 2]),
        (TokenSampling(temperature=1.0, top_p=1e-9), [1]),
        (TokenSampling(temperature=1.0, min_p=1.0), [1, 2, 4, 5]),
        (TokenSampling(temperature=1.0, top_k=3, top_p=0.6, min_p=1.0), [1, 2]),
    ],
)
def test_ties_at_a_boundary_keep_the_lower_ids(sampling: TokenSampling, kept: list[int]) -> None:
    logits = torch.tensor([-20.0, 5.0, 5.0, -20.0, 5.0, 5.0])
    assert torch.isfinite(filter_logits(logits[None], [sampling])[0]).nonzero().flatten().tolist() == kept


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(3, 1000)
    logits[1, [400, 700]] = 1.0
    logits[2, 999] = 1.0
    assert sample(logits, [TokenSampling()] * 3, [0, 1, 2]) == [0, 400, 999]
    assert sample(logits.bfloat16(), [TokenSampling()] * 3, [0, 1, 2]) == [0, 400, 999]


@pytest.mark.parametrize("temperature", [1e-12, 9e-6, 1.1e-5, 1e-3])
def test_a_low_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(5)) * 5
    sampling = TokenSampling(temperature=temperature, seed=9)
    assert sample(logits, [sampling] * 20, range(20)) == logits.argmax(dim=-1).tolist()


def test_rows_are_sampled_by_their_own_settings_and_positions() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(6))
    each = [
        TokenSampling(),
        TokenSampling(temperature=1.0, seed=1),
        TokenSampling(temperature=2.0, seed=2, top_k=20),
        TokenSampling(temperature=1.0, seed=1, choice=4),
    ]
    positions = [7, 3, 900, 3]
    together = sample(logits, each, positions)
    assert together[0] == int(logits[0].argmax())
    for row in range(4):
        assert sample(logits[row : row + 1], each[row : row + 1], positions[row : row + 1]) == [together[row]]
    assert sample(logits.flip(0), each[::-1], positions[::-1]) == together[::-1]
    assert sample(logits[:0], [], []) == []


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """Noise of the tokens of ``LOGITS`` at every position [NUM_DRAWS, V], computed all at once."""
    zero = torch.zeros((), dtype=torch.int64)
    positions = torch.arange(NUM_DRAWS)[:, None]
    words = philox4x32((77, 0), (torch.arange(len(LOGITS) // 4)[None], positions, zero, zero))
    flat = torch.stack(torch.broadcast_tensors(*words), dim=-1).reshape(NUM_DRAWS, -1)
    return -torch.log(-torch.log(((flat >> 9).float() + 0.5) * 2.0**-23))


@pytest.mark.parametrize("sampling", SETTINGS)
def test_tokens_have_exactly_the_filtered_distribution(sampling: TokenSampling, noise: torch.Tensor) -> None:
    from scipy import stats

    sampling = TokenSampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, seed=77)
    tokens = (filter_logits(LOGITS[None], [sampling]) + noise).argmax(dim=-1)
    # `sample` goes one row at a time; the vectorised draws above are its own
    positions = list(range(0, NUM_DRAWS, NUM_DRAWS // 60))
    assert torch.equal(gumbel(77, 0, positions[-1], torch.arange(len(LOGITS))), noise[positions[-1]])
    drawn = sample(LOGITS.expand(len(positions), -1), [sampling] * len(positions), positions)
    assert drawn == tokens[positions].tolist()

    probabilities = np.exp(expected_filter(LOGITS, sampling))
    probabilities /= probabilities.sum()
    counts = torch.bincount(tokens, minlength=len(LOGITS)).numpy()
    assert not counts[probabilities == 0].any()
    alive = probabilities > 0
    assert stats.chisquare(counts[alive], probabilities[alive] * NUM_DRAWS).pvalue > 1e-3


def group(token_ids: list[int], parents: list[int], first_sampled_row: int) -> RequestPlan:
    return RequestPlan(0, 5, 0, [], token_ids, parents, first_sampled_row, TokenSampling())


def test_accept_on_chains() -> None:
    chain = group([7, 1, 2, 3], [-1, 0, 1, 2], 0)
    assert accept(chain, [1, 2, 3, 4]) == ([1, 2, 3, 4], [0, 1, 2, 3])
    assert accept(chain, [1, 2, 9, 4]) == ([1, 2, 9], [0, 1, 2])
    assert accept(chain, [9, 2, 3, 4]) == ([9], [0])
    assert accept(group([7], [-1], 0), [3]) == ([3], [0])


def test_accept_counts_known_rows_as_context() -> None:
    assert accept(group([7, 8, 9], [-1, 0, 1], 2), [4]) == ([4], [0, 1, 2])
    assert accept(group([7, 8, 9], [-1, 0, 1], 3), []) == ([], [0, 1, 2])
    assert accept(group([7, 8, 9, 4, 5], [-1, 0, 1, 2, 3], 2), [4, 6, 0]) == ([4, 6], [0, 1, 2, 3])


@st.composite
def trees(draw: st.DrawFn) -> tuple[RequestPlan, list[int]]:
    """A known chain, then a random tree of drafts over a small vocabulary; no two siblings alike."""
    first = draw(st.integers(0, 3))
    parents, tokens = list(range(-1, first)), [0] * (first + 1)
    for row in range(first + 1, first + 1 + draw(st.integers(0, 9))):
        parent = draw(st.integers(first, row - 1))
        taken = {tokens[r] for r in range(first + 1, row) if parents[r] == parent}
        free = [token for token in range(3) if token not in taken]
        if not free:
            break
        parents.append(parent)
        tokens.append(draw(st.sampled_from(free)))
    sampled = [draw(st.integers(0, 2)) for _ in tokens[first:]]
    return group(tokens, parents, first), sampled


@settings(max_examples=200, deadline=None)
@given(trees())
def test_accept_is_the_longest_path_that_sampling_would_have_taken(case: tuple[RequestPlan, list[int]]) -> None:
    request, sampled = case
    first = request.first_sampled_row

    def right(row: int) -> bool:
        """Every draft from the root to ``row`` is the token sampled at its parent."""
        while row > first:
            parent = request.parents[row]
            if request.token_ids[row] != sampled[parent - first]:
                return False
            row = parent
        return True

    def ancestors(row: int) -> list[int]:
        return [] if row < 0 else [*ancestors(request.parents[row]), row]

    best = max((ancestors(row) for row in range(first, len(request.token_ids)) if right(row)), key=len)
    tokens, path = accept(request, sampled)
    assert path == best
    assert tokens == [sampled[row - first] for row in best[first:]]


@pytest.mark.parametrize("vocabulary", [1, 3, 6, 97, 4097, 50_001])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0, 40.0])
def test_tokens_that_get_no_noise_could_not_have_won(vocabulary: int, spread: float) -> None:
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    logits[3, vocabulary // 2] += 25
    samplings = [
        TokenSampling(temperature=t, top_k=k, top_p=p, seed=2**40 + i, choice=i)
        for i, (t, k, p) in enumerate(
            [(1.0, 0, 1.0), (0.01, 0, 1.0), (2.0, 0, 1.0), (1.0, 0, 1.0), (1, 5, 1), (1, 0, 0.7)]
        )
    ]
    ids = torch.arange(vocabulary)
    for batch in (samplings, [samplings[0]] * 6):
        scores = filter_logits(logits, batch)
        noise = torch.stack([gumbel(s.seed, s.choice, 9 * row, ids) for row, s in enumerate(batch)])
        assert sample(logits, batch, [9 * row for row in range(6)]) == (scores + noise).argmax(dim=-1).tolist()


def test_noise_is_below_its_bound() -> None:
    largest = -torch.log(-torch.log(torch.tensor((2**23 - 0.5) * 2.0**-23, dtype=torch.float32)))
    assert 16 < float(largest) < MAX_GUMBEL
