"""Label correction from embeddings: vote, doubt, vote again, decide."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from als_ext import ops
from als_ext.correction._inputs import (
    Array,
    check_length,
    read_embeddings,
    read_labels,
    read_mask,
    read_scores,
)
from als_ext.correction.config import CorrectionConfig
from als_ext.correction.result import ArrayT, CorrectionResult
from als_ext.correction.selection import choose_k, sample_graph, usable_candidates
from als_ext.correction.suspects import (
    noise_channel,
    score_evidence,
    score_threshold,
    vote_evidence,
)

_BLOCK = 1 << 22  # neighbour labels gathered in one go: 32 MiB


def correct_labels(
    embeddings: ArrayT,
    labels: Array,
    scores: Array | None = None,
    *,
    num_classes: int | None = None,
    k: int | str = "auto",
    suspects: str | float | Array = "auto",
    voters: str | Array = "trusted",
    metric: str = "cosine",
    min_share: float = 0.0,
    min_margin: float = 0.0,
    rounds: int = 2,
    vote_smoothing: float = 1e-3,
    score_limit: float = 0.0,
    precision: str = "exact",
    seed: int = 0,
) -> CorrectionResult[ArrayT]:
    r"""Find wrong labels and replace them by what the nearest neighbours say. No training.

    All samples vote for the label of their neighbours; a sample whose label loses is a suspect.
    Then the others, the trusted, vote alone, and the given label :math:`y` of a sample gives way to
    the winner :math:`w \ne y` when (Bayes' rule; the project's own procedure, see
    docs/correction.md)

    .. math:: \log\frac{s_w + a}{s_y + a} + \log\frac{T_{wy}}{T_{yy}} + \ell > 0

    with the shares :math:`s` of the votes, smoothing :math:`a`, the noise channel
    :math:`T_{cy} = P(\text{given } y \mid \text{true } c)` estimated from the confusion of votes
    and given labels, and :math:`\ell \le 0` what the score says for the label.

    Args:
        embeddings: [n, D] floating, n >= 2; torch tensor (CPU or CUDA) or numpy array, a memory map
            included. Used as float32. One row a sample; ``metric`` "cosine" ignores their lengths.
        labels: [n] integers in [0, num_classes), torch or numpy.
        scores: [n] finite real numbers, the higher the more suspect (a mean loss,
            :meth:`als_ext.SampleWeights.log_pi`); only their order counts. None: the suspects come
            from the neighbours alone.
        num_classes: number of classes, >= 1; None: the highest label + 1.
        k: neighbours that vote, in [1, n - 1], or "auto" (chosen from the data).
        suspects: "auto" as above. Otherwise these and only these may be relabelled, by the plain
            vote of the voters: "score" (above Otsu's threshold of the scores), a number q in (0, 1)
            (the share q with the highest scores) or a bool mask [n].
        voters: "trusted" (all but the suspects), "all", or a bool mask [n].
        metric: "cosine" or "l2".
        min_share: least share of the votes for a relabel, in [0, 1].
        min_margin: least lead over the second class for a relabel, in [0, 1].
        rounds: votes of the trusted, >= 1; the suspects are found anew between them.
        vote_smoothing: a above, in (0, 1]: neighbours never speak for a label by more than 1 : a.
        score_limit: upper bound of l above, >= 0 nats; see :class:`CorrectionConfig`.
        precision: "exact" or "fast", see :func:`als_ext.ops.knn`.
        seed: of the sample of rows on which k is chosen, >= 0.

    Returns:
        A :class:`CorrectionResult`, its arrays in the library (and on the device) of
        ``embeddings``.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not fit, labels or k out of range, NaN or inf (named by row),
            scores missing where ``suspects`` needs them, no voter left.

    Note:
        No gradient. The same input gives the same result to the bit. Memory: the embeddings in
        float32, 12 n k bytes for the neighbours (kept in the result), and, with k "auto", the same
        for ``selection_size`` rows and the largest candidate; never n x n.

    Example:
        >>> import torch
        >>> from als_ext import correct_labels
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = torch.arange(200) % 2
        >>> x = torch.randn(200, 8, generator=generator) + 4 * truth[:, None]
        >>> given = truth.clone()
        >>> given[:40] = 1 - given[:40]
        >>> result = correct_labels(x, given, metric="l2")
        >>> bool((result.new_label == truth).all()), result.summary()["changed"]
        (True, 40)
    """
    config = CorrectionConfig(
        k=k,
        suspects=suspects if isinstance(suspects, (str, float, int)) else "auto",
        voters=voters if isinstance(voters, str) else "trusted",
        metric=metric,
        min_share=min_share,
        min_margin=min_margin,
        rounds=rounds,
        vote_smoothing=vote_smoothing,
        score_limit=score_limit,
        precision=precision,
        seed=seed,
    )
    x = read_embeddings(embeddings)
    n, device = x.shape[0], x.device
    given, classes = read_labels(labels, num_classes, device)
    check_length("labels", given, n)
    result = correct(
        x,
        given,
        given,
        None if scores is None else read_scores(scores, n, device),
        classes,
        config,
        suspect_mask=None
        if isinstance(suspects, (str, float, int))
        else read_mask("suspects", suspects, n, device),
        voter_mask=None if isinstance(voters, str) else read_mask("voters", voters, n, device),
    )
    return result.numpy() if isinstance(embeddings, np.ndarray) else result


def correct(
    x: Tensor,
    given: Tensor,
    current: Tensor,
    score: Tensor | None,
    num_classes: int,
    config: CorrectionConfig,
    *,
    suspect_mask: Tensor | None = None,
    voter_mask: Tensor | None = None,
) -> CorrectionResult[Tensor]:
    """The procedure on checked tensors. Every decision is about ``given``, never ``current``.

    ``current`` differs from ``given`` where an earlier correction relabelled: there the score
    belongs to a label of our own making and is not heard, so that no decision confirms itself.
    """
    suspect, threshold = suspect_mask, None
    if suspect is None and config.suspects != "auto":
        if score is None:
            raise ValueError(
                f"scores: expected one number a row (suspects={config.suspects!r}), got None"
            )
        threshold = score_threshold(score, config.suspects)
        suspect = score >= threshold
    find_suspects = suspect is None

    poll = _Poll(x, given, num_classes, config)
    k_votes = []
    if suspect is None:
        everyone = torch.zeros_like(given, dtype=torch.bool)
        first = poll.vote(_voter_labels(given, everyone, config.voters, voter_mask))
        k_votes.append(first.k)
        suspect = first.winner != given
    for _ in range(config.rounds if find_suspects else 1):
        voter = _voter_labels(given, suspect, config.voters, voter_mask)
        vote = poll.vote(voter)
        k_votes.append(vote.k)
        contradicted = (vote.winner != given) & (vote.winner >= 0)
        channel = noise_channel(vote.winner, given, num_classes)
        own = _own_share(vote.indices, voter, given)
        odds = vote_evidence(vote.winner, vote.share, own, given, channel, config.vote_smoothing)
        if score is not None:
            heard = score_evidence(score, contradicted, current == given, config.score_limit)
            odds = odds + heard.masked_fill(~contradicted, 0.0)
        if find_suspects:
            suspect = contradicted & (odds > 0)
    accept = suspect & contradicted
    accept &= (vote.share >= config.min_share) & (vote.margin >= config.min_margin)
    new = torch.where(accept, vote.winner, given)
    return CorrectionResult(
        suspect=suspect,
        old_label=current.clone(),
        new_label=new,
        changed=new != current,
        winner=vote.winner,
        share=vote.share,
        margin=vote.margin,
        log_odds=odds.float(),
        neighbours=vote.indices.contiguous(),
        distances=vote.distance.contiguous(),
        channel=channel.float(),
        k=vote.k,
        k_votes=tuple(k_votes),
        threshold=threshold,
    )


def _voter_labels(given: Tensor, suspect: Tensor, voters: str, mask: Tensor | None) -> Tensor:
    """Labels of those who vote, -1 for the others."""
    if mask is None and voters == "all":
        return given
    allowed = ~suspect if mask is None else mask
    if not allowed.any():
        raise ValueError("voters: expected at least one sample that may vote, got none")
    return given.masked_fill(~allowed, -1)


class _Vote(NamedTuple):
    k: int
    winner: Tensor  # [n] int64
    share: Tensor  # [n] float32
    margin: Tensor  # [n] float32
    distance: Tensor  # [n, k] float32
    indices: Tensor  # [n, k] int64


class _Poll:
    """Votes over one graph, which is as wide as the k that the first vote chooses."""

    def __init__(
        self, x: Tensor, given: Tensor, num_classes: int, config: CorrectionConfig
    ) -> None:
        n = x.shape[0]
        if not isinstance(config.k, str):
            if config.k > n - 1:
                raise ValueError(f"k: expected in [1, {n - 1}] (the other rows), got {config.k}")
            self._candidates: tuple[int, ...] = (config.k,)
        else:
            self._candidates = usable_candidates(config.k_candidates, n, num_classes)
        self._x, self._given, self._num_classes, self._config = x, given, num_classes, config
        self._sample = sample_graph(
            x,
            self._candidates[-1],
            config.selection_size if len(self._candidates) > 1 else n,
            config.seed,
            config.metric,
            config.precision,
        )
        whole = self._sample.rows.shape[0] == n
        self._graph = (self._sample.distance, self._sample.indices) if whole else None

    def vote(self, voter: Tensor) -> _Vote:
        """Choose k for these voters and let them vote."""
        k = choose_k(self._sample, voter, self._given, self._num_classes, self._candidates)
        # The first vote, of right and wrong labels alike, needs the most neighbours.
        self._candidates = tuple(c for c in self._candidates if c <= k)
        if self._graph is None:
            config = self._config
            self._graph = ops.knn(
                self._x,
                self._x,
                k,
                metric=config.metric,
                exclude_self=True,
                precision=config.precision,
            )
        distance, indices = (part[:, :k] for part in self._graph)
        winner, share, margin = ops.knn_vote(distance, indices, voter, self._num_classes)
        return _Vote(k, winner, share, margin, distance, indices)


def _own_share(indices: Tensor, voter: Tensor, given: Tensor) -> Tensor:
    """Share of the votes for each sample's own given label, [n] float32; 0 without a voter."""
    n, k = indices.shape
    out = torch.empty(n, dtype=torch.float32, device=indices.device)
    step = max(1, _BLOCK // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        label = voter[indices[rows]]
        votes = (label >= 0).sum(dim=1).clamp_min(1)
        out[rows] = (label == given[rows, None]).sum(dim=1) / votes
    return out
