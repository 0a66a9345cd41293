"""The result of a study: shares with confidence intervals, and checks of consistency."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from scipy import stats

from pipeline.pages.study.answers import Answer, Study

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Share:
    """A share k / n with its interval (Wilson) and the two-sided exact p value of k / n = 1/2; None where n is 0."""

    count: int
    total: int
    share: float | None
    low: float | None
    high: float | None
    p_value: float | None


def binomial_share(count: int, total: int) -> Share:
    """`Share` of `count` in `total`."""
    if not total:
        return Share(0, 0, None, None, None, None)
    test = stats.binomtest(count, total, 0.5)
    low, high = test.proportion_ci(CONFIDENCE, method="wilson")
    return Share(count, total, count / total, float(low), float(high), float(test.pvalue))


def summarise(study: Study, answers: Sequence[Answer]) -> dict[str, Any]:
    """The result of a study as plain JSON types.

    Repeats count for the consistency alone. ``over_raters`` is the interval of the share of the first method when
    raters, not answers, are resampled: answers of one person are not independent, and where the two intervals differ
    much, the wider one is to be believed.
    """
    main = [answer for answer in answers if not answer.is_repeat]
    raters = Counter(answer.participant for answer in answers)
    return {
        "question": study.question,
        "methods": list(study.methods),
        "num_raters": len(raters),
        "num_raters_finished": sum(num == study.num_trials for num in raters.values()),
        "num_pairs": len(study.pairs),
        "num_answers": len(main),
        "preference": {
            name: vars(binomial_share(sum(answer.chosen_method == name for answer in main), len(main)))
            for name in study.methods
        },
        "over_raters": _over_raters(study.methods[0], main),
        "left_chosen": vars(binomial_share(sum(answer.chosen_side == "left" for answer in main), len(main))),
        "same_when_repeated": vars(_same_when_repeated(answers)),
        "agreement_between_raters": _agreement(main),
        "pairs": [
            {"name": pair, **{name: _num_for(name, [a for a in main if a.pair == pair]) for name in study.methods}}
            for pair in study.pairs
        ],
    }


def to_table(result: dict[str, Any]) -> str:
    """The result for people."""
    finished = f"{result['num_raters_finished']} of {result['num_raters']} finished"
    lines = [
        f"{result['question']}  {result['num_answers']} answers on {result['num_pairs']} pairs, {finished}",
        "",
        f"| method | chosen | share | {CONFIDENCE:.0%} interval | p |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {_row(share)} |" for name, share in result["preference"].items()),
        "",
        "| check | count | share | interval | p |",
        "| --- | --- | --- | --- | --- |",
        f"| left side chosen | {_row(result['left_chosen'])} |",
        f"| same method when asked again | {_row(result['same_when_repeated'])} |",
    ]
    if result["over_raters"] is not None:
        low, high = result["over_raters"]
        lines += ["", f"{result['methods'][0]} over raters, whose answers belong together: {low:.1%} to {high:.1%}"]
    if result["agreement_between_raters"] is not None:
        lines += ["", f"two raters agree on a pair: {result['agreement_between_raters']:.1%}"]
    return "\n".join(lines)


def _row(share: dict[str, Any]) -> str:
    if not share["total"]:
        return "0 of 0 | - | - | -"
    interval = f"{share['low']:.1%} to {share['high']:.1%}"
    return f"{share['count']} of {share['total']} | {share['share']:.1%} | {interval} | {share['p_value']:.2g}"


def _num_for(method: str, answers: Sequence[Answer]) -> int:
    return sum(answer.chosen_method == method for answer in answers)


def _over_raters(method: str, answers: Sequence[Answer]) -> list[float] | None:
    """Percentile bootstrap over raters of the pooled share; None for fewer than two."""
    by_rater = [list(rows) for _, rows in groupby(answers, key=lambda answer: answer.participant)]
    if len(by_rater) < 2:
        return None
    counts = np.array([_num_for(method, rows) for rows in by_rater])
    totals = np.array([len(rows) for rows in by_rater])
    drawn = np.random.default_rng(0).integers(len(by_rater), size=(NUM_RESAMPLES, len(by_rater)))
    shares = counts[drawn].sum(axis=1) / totals[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(shares, (tail, 1 - tail))]


def _same_when_repeated(answers: Sequence[Answer]) -> Share:
    first = {(a.participant, a.pair): a.chosen_method for a in answers if not a.is_repeat}
    repeats = [a for a in answers if a.is_repeat]
    return binomial_share(sum(first[a.participant, a.pair] == a.chosen_method for a in repeats), len(repeats))


def _agreement(answers: Sequence[Answer]) -> float | None:
    """Probability that two raters of a pair chose the same, over all pairs of raters of all pairs."""
    agreeing = possible = 0
    by_pair: dict[str, Counter[str]] = {}
    for answer in answers:
        by_pair.setdefault(answer.pair, Counter())[answer.chosen_method] += 1
    for chosen in by_pair.values():
        num = chosen.total()
        agreeing += sum(n * (n - 1) for n in chosen.values())
        possible += num * (num - 1)
    return agreeing / possible if possible else None
