from __future__ import annotations

import pytest

from penstock.cluster.speculation.batch import Batch, RequestView
from penstock.cluster.speculation.cascade import CascadeController
from penstock.cluster.speculation.controller import Controller
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import RequestOutcome, StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.speculation.policy import POLICIES, make_controller
from penstock.cluster.speculation.proposal import Evidence, Proposal
from penstock.cluster.speculation.shadow import ShadowController

from .simulated_jobs import Job, bernoulli
from .simulated_machine import Machine
from .speculation_simulator import simulate


def controller(policy: str, num_ranks: int = 1, draft_len: int = 3, max_draft_len: int = 7) -> Controller:
    return make_controller(
        policy,
        draft_len=draft_len,
        max_draft_len=max_draft_len,
        num_experts=32,
        num_experts_per_tok=4,
        num_ranks=num_ranks,
    )


def test_policies_by_name() -> None:
    kinds = [FixedController, FixedController, CascadeController, ShadowController]
    assert [type(controller(policy)) for policy in POLICIES] == kinds
    with pytest.raises(ValueError, match=r"^speculation: 'oracle' is not one of off, fixed, cascade, shadow$"):
        controller("oracle")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "on"}, "speculation.mode: 'on' is not one of auto, off, fixed"),
        ({"max_draft_len": -1}, r"speculation.max_draft_len: -1 is not an integer in \[0, 64\]"),
        ({"max_draft_len": 65}, r"speculation.max_draft_len: 65 is not an integer in \[0, 64\]"),
        ({"max_draft_len": True}, r"speculation.max_draft_len: True is not an integer in \[0, 64\]"),
        ({"max_draft_len": 1.5}, r"speculation.max_draft_len: 1.5 is not an integer in \[0, 64\]"),
        ({"mode": "off", "max_draft_len": 2}, "speculation.max_draft_len: 2 is not 0, and speculation.mode is off"),
    ],
)
def test_a_requests_options_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SpeculationOptions(**values)  # type: ignore[arg-type]


def test_a_request_can_only_lower_the_limit() -> None:
    assert SpeculationOptions().limit(7, 100) == 7
    assert SpeculationOptions(max_draft_len=3).limit(7, 100) == 3
    assert SpeculationOptions("fixed", 9).limit(7, 100) == 7
    assert SpeculationOptions("off").limit(7, 100) == 0
    assert SpeculationOptions().limit(0, 100) == 0
    # every step yields one token beside the drafts
    assert [SpeculationOptions().limit(7, left) for left in (1, 2, 5)] == [0, 1, 4]


def silent(job: Job) -> Job:
    """The job, with a drafter that must not be called."""

    def never(num_output: int) -> int:
        raise AssertionError("the drafter was called")

    return Job(job.prompt, job.output, never, options=job.options)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_off_and_zero_call_no_drafter(batch_size: int) -> None:
    jobs = [silent(bernoulli(seed, 20, lambda i: 1.0)) for seed in range(4)]
    for policy, lengths in (("off", {}), ("fixed", {"draft_len": 0}), ("cascade", {"max_draft_len": 0})):
        run = simulate(controller(policy, **lengths), jobs, batch_size=batch_size, max_draft_len=7)
        assert run.num_tokens == 80
        assert all(length == 0 for lens in run.draft_lens.values() for length in lens)


def test_cascade_calls_no_drafter_while_its_length_is_zero() -> None:
    cascade, calls = CascadeController(7), []
    job = bernoulli(0, 120, lambda i: 0.0)

    def noted(num_output: int) -> int:
        calls.append(cascade.report(0).phase)
        return 0

    run = simulate(cascade, [Job(job.prompt, job.output, noted)])
    assert set(calls) == {"test"}
    assert {"baseline", "test", "disabled"} <= set(run.phases[0])
    assert len(calls) == sum(length > 0 for length in run.draft_lens[0])


def test_a_request_with_mode_off_never_drafts_beside_others_that_do() -> None:
    willing = bernoulli(1, 60, lambda i: 1.0)
    unwilling = silent(Job(*_texts(2), options=SpeculationOptions("off")))
    for policy in ("fixed", "cascade", "shadow"):
        run = simulate(controller(policy), [willing, unwilling], batch_size=2)
        assert not any(run.draft_lens[1])
        assert any(run.draft_lens[0])


def test_a_fixed_request_overrides_the_policy_and_a_limit_binds_it() -> None:
    hopeless = bernoulli(3, 80, lambda i: 0.0)
    fixed = Job(hopeless.prompt, hopeless.output, hopeless.runs, options=SpeculationOptions("fixed", 2))
    for policy in ("cascade", "shadow"):
        run = simulate(controller(policy), [fixed])
        assert set(run.draft_lens[0][:-2]) == {2}
    certain = bernoulli(4, 80, lambda i: 1.0)
    capped = Job(certain.prompt, certain.output, certain.runs, options=SpeculationOptions(max_draft_len=2))
    for policy in ("fixed", "cascade", "shadow"):
        run = simulate(controller(policy), [capped, capped])
        assert max(run.draft_lens[1]) == 2


def _texts(seed: int) -> tuple[list[int], list[int]]:
    job = bernoulli(seed, 60, lambda i: 0.0)
    return job.prompt, job.output


def test_two_ranks_take_different_lengths_in_one_step() -> None:
    shadow, fixed_s, per_expert_s = controller("shadow", num_ranks=2), 2.44e-3, 0.372e-3
    views = [RequestView(0, 0, 100, 7), RequestView(1, 1, 100, 7)]
    proposal = Proposal([5] * 7, Evidence("ngram", 3, (0.8,) * 7))
    batch = Batch(views, num_ranks=2)
    good, bad = bernoulli(5, 300, lambda i: 0.95), bernoulli(6, 300, lambda i: 0.0)
    simulate(shadow, [good, bad] * 2, Machine(num_ranks=2, fixed_s=fixed_s, per_expert_s=per_expert_s), batch_size=2)
    from penstock.cluster.speculation.observation import ShadowTrial

    trials = [ShadowTrial(key, proposal.evidence, 0, 7 * (1 - key), 7 - 6 * key) for key in (0, 1)] * 8
    outcomes = [RequestOutcome(0, 0, 0, 1), RequestOutcome(1, 0, 0, 1)]
    step_s = fixed_s + per_expert_s * 3.3
    shadow.draft_lens(batch, [Proposal(), Proposal()])
    shadow.observe(StepObservation(step_s, outcomes, [1, 1], False, [3.3, 3.3], [2.0, 2.0]))
    shadow.learn(trials)
    lengths = shadow.draft_lens(batch, [proposal, proposal])
    assert lengths[0] > 2
    assert lengths[1] == 0
    assert lengths == shadow.draft_lens(batch, [proposal, proposal]), "a step planned again is planned the same"


@pytest.mark.parametrize("policy", ["cascade", "shadow"])
def test_nothing_is_kept_of_requests_that_have_ended(policy: str) -> None:
    subject = controller(policy)
    simulate(subject, [bernoulli(seed, 40, lambda i: 0.6) for seed in range(6)], batch_size=2)
    kept = [value for name, value in vars(subject).items() if name in ("_by_request", "_ledgers", "_draft_lens")]
    assert kept
    assert not any(kept)
    if isinstance(subject, ShadowController):
        assert not subject._acceptance._requests


@pytest.mark.parametrize("policy", ["cascade", "shadow"])
def test_utility_is_tokens_per_step_over_relative_time(policy: str) -> None:
    subject = controller(policy)
    reports = []
    job = bernoulli(8, 200, lambda i: 0.9)

    def runs(num_output: int) -> int:
        reports.append(subject.report(0))
        return job.runs(num_output) if job.runs else 0

    run = simulate(subject, [Job(job.prompt, job.output, runs)], Machine(experts_noise=0.0))
    last = reports[-1]
    assert last.baseline_s == pytest.approx(2.44e-3 + 4 * 0.372e-3, rel=0.02)
    assert last.utility == pytest.approx(run.num_tokens / (run.time_s / last.baseline_s), rel=0.05)
    assert last.utility > 1.5


def test_a_drafter_says_how_likely_its_tokens_are_reached() -> None:
    proposal = Proposal([5] * 4, Evidence("ngram", 3, (0.8, 0.5, 0.5, 0.9)))
    assert proposal.reach(3) == pytest.approx([0.8, 0.4, 0.2])
    assert Proposal([5] * 4, Evidence("prediction", 3)).reach(2) == [1.0, 1.0]
    for policy in ("fixed", "cascade"):
        assert controller(policy).reach(0, proposal, 2) == pytest.approx([0.8, 0.4])
