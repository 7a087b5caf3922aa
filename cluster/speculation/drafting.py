"""The drafters of all live requests, kept in step with their texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .drafter import DraftContext, Drafter, DrafterFactory
from .observation import ShadowTrial
from .output_store import OutputStore
from .proposal import Proposal


class Drafting:
    """Makes each request's drafter when it is first asked, feeds it what the text gained, and shares one store.

    With ``keep_trials`` every proposal is kept until the text that followed has settled it (shadow drafting): what
    was not verified teaches as much as what was, for no more than a comparison.
    """

    def __init__(self, make_drafter: DrafterFactory, store_tokens: int, *, keep_trials: bool) -> None:
        self._make_drafter, self._keep_trials = make_drafter, keep_trials
        self._store = OutputStore(store_tokens)
        self._contexts: dict[int, DraftContext] = {}
        self._sessions: dict[int, _Session] = {}

    def open(self, key: int, context: DraftContext) -> None:
        """Announce a request; nothing is indexed before it is first asked."""
        self._contexts[key] = context

    def index(self, key: int, token_ids: Sequence[int]) -> None:
        """Let the drafter know the text so far: a long prompt chunk by chunk, not all of it when it first proposes."""
        self._session(key).index(token_ids)

    def propose(self, key: int, token_ids: Sequence[int], max_draft_len: int) -> Proposal:
        """Return the drafter's proposal after ``token_ids`` (prompt and output so far, which only ever grow).

        Asked again at the same length (a step planned again), it answers the same.
        """
        return self._session(key).propose(token_ids, max_draft_len, keep=self._keep_trials)

    def settle(self, key: int, token_ids: Sequence[int]) -> list[ShadowTrial]:
        """Compare kept proposals with the text, after it has grown; return what is newly known."""
        session = self._sessions.get(key)
        return session.settle(token_ids) if session else []

    def close(self, key: int, token_ids: Sequence[int]) -> None:
        """The request has ended with this text: drop its drafter, and store its output if it ever drafted."""
        context = self._contexts.pop(key)
        if self._sessions.pop(key, None):
            self._store.add(token_ids[context.num_prompt_tokens :])

    def _session(self, key: int) -> _Session:
        if key not in self._sessions:
            self._sessions[key] = _Session(key, self._make_drafter(self._contexts[key], self._store))
        return self._sessions[key]


class _Session:
    def __init__(self, key: int, drafter: Drafter) -> None:
        self._key, self._drafter = key, drafter
        self._num_seen = 0
        self._pending: deque[tuple[int, int, Proposal]] = deque()
        """Proposals not settled yet: where each begins, how many of its tokens were right so far, and itself."""

    def index(self, token_ids: Sequence[int]) -> None:
        self._drafter.extend(token_ids[self._num_seen :])
        self._num_seen = max(self._num_seen, len(token_ids))

    def propose(self, token_ids: Sequence[int], max_draft_len: int, *, keep: bool) -> Proposal:
        self.index(token_ids)
        proposal = self._drafter.propose(max_draft_len)
        is_repeated = self._pending and self._pending[-1][0] == len(token_ids)
        if keep and proposal and not is_repeated:
            self._pending.append((len(token_ids), 0, proposal))
        return proposal

    def settle(self, token_ids: Sequence[int]) -> list[ShadowTrial]:
        trials = []
        for _ in range(len(self._pending)):
            start, first, proposal = self._pending.popleft()
            right = first
            end = min(len(proposal), len(token_ids) - start)
            while right < end and proposal.token_ids[right] == token_ids[start + right]:
                right += 1
            known = min(right + 1, end)
            if known > first:
                trials.append(ShadowTrial(self._key, proposal.evidence, first, right, known))
            if known == right < len(proposal):
                self._pending.append((start, right, proposal))
        return trials
