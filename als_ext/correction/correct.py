"""Label correction from embeddings: find what survives, vote with it, decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from als_ext.correction._inputs import (
    Array,
    check_length,
    read_embeddings,
    read_labels,
    read_mask,
    read_scores,
)
from als_ext.correction.config import CorrectionConfig, neighbourhoods, neighbours_that_vote
from als_ext.correction.graph import Graph
from als_ext.correction.result import ArrayT, CorrectionResult
from als_ext.correction.rows import HERE, Rows, SpreadRows
from als_ext.correction.survival import surviving_labels
from als_ext.correction.suspects import ScoreBins, noise_channel, score_threshold
from als_ext.correction.votes import bayes_vote, plain_vote
from als_ext.distributed.processes import Facts, Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    min_margin: float = -1.0,
    rounds: int = 6,
    vote_smoothing: float = 1e-3,
    score_limit: float = 0.0,
    precision: str = "exact",
    group: ProcessGroup | None = None,
) -> CorrectionResult[ArrayT]:
    r"""Find wrong labels and replace them by what the nearest neighbours say. No training.

    A first guess at the true labels is the class whose given labels survive at the same rate all
    over its part of the space (:mod:`als_ext.correction.survival`). Then, ``rounds`` times, the
    neighbours vote with the labels guessed so far, and each sample gets the class that is likeliest
    by Bayes' rule (the project's own procedure, see docs/correction.md),

    .. math:: \arg\max_w\; \log(s_w + a) + \log T_{wy} + [w \ne y]\, \ell

    with its given label :math:`y`, the shares :math:`s` of the votes, smoothing :math:`a`, the
    noise channel :math:`T_{cy} = P(\text{given } y \mid \text{true } c)` estimated from the
    confusion of guessed and given labels, and :math:`\ell \le 0` what the score says for the label.

    Args:
        embeddings: [n, D] floating, n >= 2; torch tensor (CPU or CUDA) or numpy array, a memory map
            included. Used as float32. One row a sample; ``metric`` "cosine" ignores their lengths.
        labels: [n] integers in [0, num_classes), torch or numpy.
        scores: [n] finite real numbers, the higher the more suspect (a mean loss,
            :meth:`als_ext.SampleWeights.scores`); only their order counts. None: the suspects come
            from the neighbours alone.
        num_classes: number of classes, >= 1; None: the highest label + 1. Classes that nobody was
            given change nothing, but for 4 bytes times the square of this.
        k: neighbours that vote, in [1, n - 1], or "auto": 20, fewer where classes are small: a
            sixteenth of their mean size, so that below 32 samples a class a single one votes.
        suspects: "auto" as above. Otherwise these and only these may be relabelled, by the plain
            vote of the voters: "score" (above Otsu's threshold of the scores), a number q in (0, 1)
            (the share q with the highest scores) or a bool mask [n].
        voters: "trusted" (all; with given suspects all but these), "all", or a bool mask [n].
        metric: "cosine" or "l2".
        min_share: least share of the votes for a relabel, in [0, 1].
        min_margin: least lead over the best other class for a relabel, in [-1, 1].
        rounds: votes after the first guess, >= 1.
        vote_smoothing: a above, in (0, 1]: neighbours never speak for a label by more than 1 : a.
        score_limit: upper bound of l above, >= 0 nats; see :class:`CorrectionConfig`.
        precision: "exact" or "fast", see :func:`als_ext.ops.knn`.
        group: processes that have the rows between them, in their order, each its own; all of them
            have to call this. Any number of rows, 0 included. None: all rows are here.

    Returns:
        A :class:`CorrectionResult`, its arrays in the library (and on the device) of
        ``embeddings``. With a group it is about the rows here, and the same as of one process;
        ``neighbours`` counts over all rows.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes that do not fit, labels or k out of range, NaN or inf (named by row),
            scores missing where ``suspects`` needs them, no voter left. What is wrong in one
            process of a group is an error in all, as are settings that differ.
        RuntimeError: a process of the group is gone.

    Note:
        No gradient. The same input gives the same result to the bit. Labels that are all moved in
        one way in half of the cases or more (pair noise above 50 %) cannot be told from right
        ones. Memory: the embeddings in float32, 12 n max(k, 50) bytes for the neighbours, up to
        156 n for the guesses of all rates, and about 200 MB where n times the classes exceeds four
        million; never n x n. docs/scale.md has memory and traffic of a group.

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

    def read() -> _Inputs:
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
        )
        least = 2 if group is None else 0
        x = read_embeddings(embeddings, least=least)
        n, device = x.shape[0], x.device
        given, classes = read_labels(labels, num_classes, device, least=min(least, 1))
        check_length("labels", given, n)
        return _Inputs(
            config,
            x,
            given,
            None if scores is None else read_scores(scores, n, device),
            classes,
            None
            if isinstance(suspects, (str, float, int))
            else read_mask("suspects", suspects, n, device),
            None if isinstance(voters, str) else read_mask("voters", voters, n, device),
        )

    if group is None:
        inputs, rows = read(), HERE
    else:
        inputs, rows = _read_together(Processes(group), read, num_classes)
    result = correct(
        inputs.x,
        inputs.given,
        inputs.given,
        inputs.score,
        inputs.classes,
        inputs.config,
        suspect_mask=inputs.suspects,
        voter_mask=inputs.voters,
        rows=rows,
    )
    return result.numpy() if isinstance(embeddings, np.ndarray) else result


class _Inputs(NamedTuple):
    """Checked arguments."""

    config: CorrectionConfig
    x: Tensor
    given: Tensor
    score: Tensor | None
    classes: int
    suspects: Tensor | None
    voters: Tensor | None


def _read_together(
    processes: Processes,
    read: Callable[[], _Inputs],
    num_classes: int | None,
) -> tuple[_Inputs, Rows]:
    """Arguments of this process, checked in all; the classes are those of all labels."""
    found: list[_Inputs] = []

    def check() -> tuple[Facts, Facts]:
        own = read()
        found.append(own)
        settings = {"columns of embeddings": own.x.shape[1], "settings": own.config}
        settings["num_classes"] = num_classes
        for name in ("score", "suspects", "voters"):
            settings[f"{name} given"] = getattr(own, name) is not None
        return settings, {"rows": len(own.x), "classes": own.classes}

    facts = processes.agree(check)
    rows = [fact["rows"] for fact in facts]
    if sum(rows) < 2:
        raise ValueError(
            f"embeddings: expected at least 2 rows over all processes, got {sum(rows)}"
        )
    classes = max(fact["classes"] for fact in facts)
    return found[0]._replace(classes=classes), SpreadRows(processes, rows)


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
    guess: Tensor | None = None,
    votes_only: bool = False,
    rows: Rows = HERE,
) -> CorrectionResult[Tensor]:
    """The procedure on checked tensors. Every decision is about ``given``, never ``current``.

    ``current`` differs from ``given`` where an earlier correction relabelled: there the score
    belongs to a label of our own making and is not heard, so that no decision confirms itself.
    ``guess`` [n] int64 takes the place of the first guess. With ``votes_only`` given labels are no
    evidence beyond that guess. Classes that are neither given nor guessed have no part in it.
    """
    count = torch.bincount(given, minlength=num_classes)
    if guess is not None:
        count += torch.bincount(guess, minlength=num_classes)
    present = rows.sum(count).nonzero()[:, 0]
    code = torch.full_like(count, -1)
    code[present] = torch.arange(len(present), device=code.device)
    before, size, num_classes = current, num_classes, len(present)
    given, current = code[given], code[current]  # -1 where it is of a class that is not present
    guess = None if guess is None else code[guess]

    suspect, threshold = suspect_mask, None
    if suspect is None and config.suspects != "auto":
        if score is None:
            raise ValueError(
                f"scores: expected one number a row (suspects={config.suspects!r}), got None"
            )
        threshold = score_threshold(rows.everywhere(score), config.suspects)
        suspect = score >= threshold
    _, n = rows.span(len(given))
    k = neighbours_that_vote(config.k, n, num_classes)
    region, spread = neighbourhoods(config.region, config.spread, n, num_classes)
    widest = k if suspect is not None else max(k, region, *spread)
    graph = Graph(x, widest, config.metric, config.precision, rows)
    first = survival = None
    if suspect is not None:
        voter = _voters(given, suspect, config.voters, voter_mask, rows)
        vote = plain_vote(graph, voter, given, num_classes, k, config.vote_smoothing)
        contradicted = (vote.winner != given) & (vote.winner >= 0)
        accept = suspect & contradicted
    else:
        everyone = torch.zeros_like(given, dtype=torch.bool)
        voter = _voters(given, everyone, config.voters, voter_mask, rows)
        if guess is None:
            label, survival = surviving_labels(graph, voter, num_classes, region, spread)
        else:
            label, survival = guess, int(rows.sum((guess == given).sum())) / n
        first = label
        bins = None if score is None else ScoreBins(score, current == given, rows)
        for _ in range(config.rounds):
            voting = label.masked_fill(voter < 0, -1)
            sure = graph.unanimous(label, voting, k)
            channel = noise_channel(label, given, num_classes, sure, rows)
            vote = bayes_vote(
                graph,
                voting,
                given,
                torch.ones_like(channel) if votes_only else channel,
                k,
                config.vote_smoothing,
                None if bins is None else bins.evidence(label != given, config.score_limit),
            )._replace(channel=channel)
            label = torch.where(vote.winner < 0, given, vote.winner)
        accept = suspect = label != given
    accept = accept & (vote.share >= config.min_share) & (vote.margin >= config.min_margin)
    new = present[torch.where(accept, vote.winner, given)]
    channel = torch.zeros(size, size, device=x.device)
    channel[present[:, None], present] = vote.channel.float()
    channel[code < 0] = 1.0 / size
    return CorrectionResult(
        suspect=suspect,
        old_label=before.clone(),
        new_label=new,
        changed=new != before,
        winner=torch.where(vote.winner < 0, -1, present[vote.winner]),
        share=vote.share,
        margin=vote.margin,
        log_odds=vote.log_odds,
        neighbours=graph.indices[:, :k].contiguous(),
        distances=graph.distance[:, :k].contiguous(),
        channel=channel,
        guess=None if first is None else present[first],
        k=k,
        survival=survival,
        threshold=threshold,
    )


def _voters(given: Tensor, suspect: Tensor, voters: str, mask: Tensor | None, rows: Rows) -> Tensor:
    """Labels of those who vote, -1 for the others."""
    if mask is None and voters == "all":
        return given
    allowed = ~suspect if mask is None else mask
    if int(rows.sum(allowed.sum())) == 0:
        raise ValueError("voters: expected at least one sample that may vote, got none")
    return given.masked_fill(~allowed, -1)
