"""How deep to speculate: for each verification the depth that promises the most tokens a second.

Where each drafted token is accepted with probability a, a verification of depth k yields (1 - a^(k+1)) / (1 - a) tokens
(Leviathan et al., arXiv 2211.17192, equation 1). The acceptance is that of the latest tokens that were judged, and what
a depth costs is how long its steps took, drafting included, so that nothing more is asked of the device. A depth
depends on the past alone, never on the tokens that it has judged: what is drawn keeps the target's distribution.
"""

from __future__ import annotations

from collections import Counter, deque

# Chosen: together they came within 3 % of the best constant depth (benchmarks/LOG.md, "An adaptive depth"); no other
# values are on record.
MEMORY = 32  # judged tokens after which a verdict weighs 1 / e
PRIOR = (1, 2)  # accepted of judged tokens, before there was any
PROBE = 16  # steps without speculation, after which it is tried again
PROBE_DEPTH = 2  # tokens of a probe at most: it takes little even where drafting is dear
TRIES = 3  # of every depth, before any is preferred; the first may record the step
TIMES = 8  # of a depth are remembered, of which the shortest counts
COST = 0.1  # of a drafted token, in steps, for depths that were never timed


class AdaptiveDepth:
    """Chooses among `depths` (ascending, from 0) and learns from what each choice led to."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        self.depths = depths
        self.chosen = 0
        self.idle = 0  # steps in a row in which nothing was judged
        self.accepted = self.judged = 0.0  # tokens, the older ones counting less
        self.tries: Counter[int] = Counter()
        self.seconds: dict[int, deque[float]] = {depth: deque(maxlen=TIMES) for depth in depths}

    @property
    def acceptance(self) -> float:
        """The probability that a drafted token is accepted where those before it were."""
        return (self.accepted + PRIOR[0]) / (self.judged + PRIOR[1])

    def choose(self, limit: int) -> int:
        """The next depth, at most `limit` tokens."""
        allowed = [depth for depth in self.depths if depth <= max(limit, 0)]
        untried = [depth for depth in allowed if self.tries[depth] < TRIES]
        if untried:
            self.chosen = untried[-1]  # the largest first: what it takes of memory shows at once
        else:
            costs = self._costs()
            self.chosen = max(allowed, key=lambda depth: self._tokens(depth) / costs[depth])
            if self.chosen == 0 and self.idle >= PROBE:
                self.chosen = max(depth for depth in allowed if depth <= PROBE_DEPTH)
        return self.chosen

    def observe(self, proposed: int, accepted: int, seconds: float) -> None:
        """Learn from the step that was chosen: of the `proposed` tokens, which may be fewer, so many were accepted."""
        depth = next(depth for depth in self.depths if depth >= proposed)
        self.seconds[depth].append(seconds)
        if not proposed:
            self.idle += 1
            self.tries[0] += 1
            return
        self.idle = 0
        self.tries[self.chosen] += 1
        judged = accepted + (accepted < proposed)  # what follows a rejected token says nothing
        kept = (1 - 1 / MEMORY) ** judged
        self.accepted, self.judged = kept * self.accepted + accepted, kept * self.judged + judged

    def _tokens(self, depth: int) -> float:
        """What a verification yields on average."""
        return sum(self.acceptance**position for position in range(depth + 1))

    def _costs(self) -> dict[int, float]:
        """Seconds of a step by its depth: the shortest of the latest, and never more than a deeper one took."""
        timed = {depth: min(times) for depth, times in self.seconds.items() if times}
        costs: dict[int, float] = {}
        longest = float("inf")
        for depth in reversed(self.depths):
            near = min(timed, key=lambda known: abs(known - depth), default=0)
            seconds = timed.get(near, 1.0) * (1 + COST * depth) / (1 + COST * near)
            costs[depth] = longest = min(seconds, longest)
        return costs
