"""Is a criterion right on this data? Cuts each class into strata by score, and distils from each stratum.

If the criterion is right, the most useful stratum gives the best set and the least useful one the worst: Spearman's correlation
of the stratum's number with accuracy, over all repetitions, is negative. Not covered: strata over all classes together.
"""

from __future__ import annotations

from distill_at_scale.experiments.studies import comparison
from distill_at_scale.experiments.studies.base import STATIC, UNPRUNED, Finding, StudyContext
from distill_at_scale.pipeline.report.plot_spec import Plot

ANSWERS = {
    "trustworthy": "is trustworthy on this data: the more useful a stratum by score, the better its set",
    "reversed": "is reversed on this data: strata that it calls less useful give better sets",
    "nothing": "shows nothing on this data: accuracy does not follow the strata",
}
AGREES = {"trustworthy": "this agrees", "reversed": "here it is the other way round",
          "nothing": "here it does not show"}  # fmt: skip


def study(context: StudyContext) -> Finding:
    count, section = context.config.studies.stratified.strata, context.config.studies
    stratum = {**STATIC, "select.order": "stratum", "select.scope": "class", "select.keep": 1 / count}
    context.say(f"  {count} strata, each distilled {section.seeds} times")
    # strata: the most useful first
    unpruned, *strata = context.run([UNPRUNED, *({**stratum, "select.stratum_start": k / count} for k in range(count))])

    pairs = [(float(k), value) for k, group in enumerate(strata) for value in group.accuracies]
    rho, p = comparison.rank_correlation([k for k, _ in pairs], [value for _, value in pairs])
    verdict = "nothing" if p >= comparison.SIGNIFICANT else "trustworthy" if rho < 0 else "reversed"
    means = [group.mean for group in strata]
    best = means.index(max(means)) + 1
    name, useful = comparison.criterion_of(context)
    answer = (
        f"The criterion {name} {ANSWERS[verdict]} (Spearman {f'{rho:+.2f}'.replace('-', '−')}, p = {p:.2g}, {len(pairs)} "
        f"distillations; {comparison.spread(strata[0].accuracies)} from the most useful of {count} strata, "
        f"{comparison.spread(strata[-1].accuracies)} from the least; the best is stratum {best})."
    )
    paper = f"The paper: a low loss means a high utility; {AGREES[verdict]}."
    notes = [f"{comparison.sample_size(len(strata[0].outcomes), section.evaluations)} per stratum."]
    if best not in (1, count):
        notes.append(f"The best is stratum {best} of {count}, neither end: a rank correlation sees only part of that.")
    if min(strata[0].kept_per_class) <= context.config.min_per_class:
        notes.append("Strata are as small as min_per_class, so neighbouring ones may share samples; take fewer strata.")
    rows = [{"set": f"stratum {k + 1}", **group.figures} for k, group in enumerate(strata)]
    rows.append({"set": "unpruned", **unpruned.figures})
    bars = comparison.accuracy_series("stratum", [str(k + 1) for k in range(count)], strata, "bars")
    plot = Plot("Accuracy from one stratum of the scores", "stratum, the most useful first", "top-1", [bars],
                [("unpruned", unpruned.mean)])  # fmt: skip
    facts = {"spearman": rho, "p": p, "verdict": verdict, "best_stratum": best}
    paper = paper if (name, useful) == ("loss", "low") else ""
    return Finding("stratified", "Stratified validation", answer, paper, rows, [plot], facts, notes)
