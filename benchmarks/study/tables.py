"""The tables and verdicts of a part, from the runs that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from plan import Part, Plan, Test, local_alike
from work import newcomers

from fedcmt.comparison import UPPER, Difference, Row, clients_of, difference, percent, share_of_headroom, steps
from fedcmt.variants import Variant

NOT_YET = "has not been run yet"


class Results:
    """A part's rows, asked by the names that its strategies have in the plan."""

    def __init__(self, plan: Plan, part: Part, rows: Sequence[Row]) -> None:
        self.plan, self.part, self.rows, self.kind = plan, part, rows, plan.score
        self.clients = clients_of(rows)
        self._seeds: dict[str, set[int]] = {}
        for row in rows:
            self._seeds.setdefault(row.strategy, set()).add(row.seed)

    def variant(self, name: str) -> Variant | None:
        """Of a name of the plan; ``local`` is always one."""
        return self.plan.variant(self.part.strategies.get(name, name), self.part.config)

    def seeds(self, *names: str) -> int:
        """On how many seeds all of these are there."""
        found = [self._seeds.get(variant.label, set()) if (variant := self.variant(n)) else set() for n in names]
        return len(set.intersection(*found)) if found else 0

    def to_local(self, name: str, client: str | None = None) -> Difference:
        """Difference to ``local`` under the same changes of the federation."""
        variant = self.variant(name)
        if variant is None:
            return Difference.of([])
        return difference(self.rows, variant.label, local_alike(variant).label, self.kind, client)

    def between(self, name: str, other: str) -> Difference:
        """Difference of two strategies."""
        if other == "local":
            return self.to_local(name)
        one, two = self.variant(name), self.variant(other)
        if one is None or two is None:
            return Difference.of([])
        return difference(self.rows, one.label, two.label, self.kind)

    def headroom(self, name: str) -> Difference:
        """Share of joint's lead."""
        one, upper = self.variant(name), self.variant(UPPER)
        if one is None or upper is None:
            return Difference.of([])
        return share_of_headroom(self.rows, one.label, local_alike(one).label, upper.label, self.kind)

    def worse(self, name: str) -> tuple[int, int]:
        """Clients worse off than alone, on average and significantly."""
        each = [self.to_local(name, client) for client in self.clients]
        return sum(d.mean < 0 for d in each), sum(d.high < 0 for d in each)

    def rows_of(self, name: str) -> list[Row]:
        """Its rows."""
        variant = self.variant(name)
        return [row for row in self.rows if variant is not None and row.strategy == variant.label]

    def score(self, name: str) -> float:
        """Mean over clients and seeds."""
        known = [score for row in self.rows_of(name) if not math.isnan(score := row.score(self.kind))]
        return float(np.mean(known)) if known else math.nan

    def named_rows(self) -> list[Row]:
        """Rows under the plan's names, for figures: of strategies in the part's own federation."""
        found = {name: self.variant(name) for name in self.part.strategies}
        names = {v.label: name for name, v in found.items() if v is not None and v.overrides == self.part.config}
        return [replace(row, strategy=names[row.strategy]) for row in self.rows if row.strategy in names]


def comparison_table(results: Results) -> list[str]:
    """A row for each strategy."""
    part, share = results.part, UPPER in results.part.strategies
    head = ["strategy", "seeds", "score", "minus local", *(f"minus {other}" for other in part.against)]
    head += ["share of joint's lead"] * share + ["worse", "significantly", "steps a client"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for name in part.strategies:
        if not results.seeds(name):
            lines.append(_line([name, "0", NOT_YET, *[""] * (len(head) - 3)]))
            continue
        worse, significantly = results.worse(name)
        cells = [name, str(results.seeds(name)), f"{results.score(name):.3f}"]
        is_local = results.part.strategies[name] == "local"
        cells += ["" if is_local else results.to_local(name).text]
        cells += ["" if other == name else results.between(name, other).text for other in part.against]
        cells += ["" if name == UPPER or is_local else percent(results.headroom(name))] * share
        cells += ["", ""] if is_local else [f"{worse} of {len(results.clients)}", str(significantly)]
        cells += [steps(results.rows_of(name))]
        lines.append(_line(cells))
    return lines


def client_table(results: Results) -> list[str]:
    """Differences to alone for each client."""
    names = [n for n in results.part.strategies if results.seeds(n) and results.part.strategies[n] != "local"]
    if not names:
        return []
    lines = [_line(["minus local", *results.clients]), "|---" * (len(results.clients) + 1) + "|"]
    return lines + [_line([n, *(results.to_local(n, client).text for client in results.clients)]) for n in names]


def settings_list(results: Results) -> list[str]:
    """What the names stand for."""
    texts = {name: results.plan.text_of(text) or text for name, text in results.part.strategies.items()}
    return [f"- {name}: `{text}`" for name, text in texts.items() if text != name]


def claims(results: Results) -> list[bool | None]:
    """Whether each claim of the part holds; None where runs are missing."""
    part = results.part
    if part.newcomer is not None:
        return [_newcomer_holds(results, newcomer_differences(results, text)) for text in part.strategies.values()]
    return [_holds(results, test) for test in part.tests]


def verdicts(results: Results) -> list[str]:
    """Each test of the part, and whether it holds."""
    seeds = [results.seeds(*_names(test)) for test in results.part.tests]
    words = [_verdict(*told, results.part.seeds) for told in zip(claims(results), seeds, strict=True)]
    return [f"- {test.text}: **{word}**" for test, word in zip(results.part.tests, words, strict=True)]


def _verdict(holds: bool | None, seeds: int, wanted: int) -> str:
    if holds is None:
        return f"not judged, {seeds} of {wanted} seeds are there" if seeds else f"not judged, {NOT_YET}"
    return "holds" if holds else "does not hold"


def _names(test: Test) -> list[str]:
    return [test.strategy, test.against, *([UPPER] if test.headroom_at_least is not None else [])]


def _holds(results: Results, test: Test) -> bool | None:
    if results.seeds(*_names(test)) < results.part.seeds:
        return None
    found, held = results.between(test.strategy, test.against), []
    if test.mean_at_least is not None:
        held.append(found.mean >= test.mean_at_least)
    if test.interval_above is not None:
        held.append(found.low > test.interval_above)
    if test.significantly_worse_at_most is not None:
        held.append(results.worse(test.strategy)[1] <= test.significantly_worse_at_most)
    if test.headroom_at_least is not None:
        held.append(results.headroom(test.strategy).mean >= test.headroom_at_least)
    return all(held)


def newcomer_table(results: Results) -> list[str]:
    """A row for each strategy: the newcomer against itself alone, the others against a federation without it."""
    told = results.part.newcomer
    assert told is not None
    head = ["strategy", "seeds", f"{told.client} minus alone", "minus alone from the start", "others minus without", ""]
    lines = [_line(head), "|---" * len(head) + "|"]
    for name, text in results.part.strategies.items():
        found = newcomer_differences(results, text)
        seeds = min(difference.pairs for difference in found)
        verdict = _verdict(_newcomer_holds(results, found), seeds, results.part.seeds)
        lines.append(_line([name, str(seeds), *(difference.text for difference in found), f"**{verdict}**"]))
    return lines


def _newcomer_holds(results: Results, found: Sequence[Difference]) -> bool | None:
    told = results.part.newcomer
    assert told is not None
    if min(difference.pairs for difference in found) < results.part.seeds:
        return None
    return found[0].mean >= told.mean_at_least and found[2].mean >= -told.others_lose_at_most


def newcomer_differences(results: Results, strategy: str) -> list[Difference]:
    """With it minus alone in the same rounds, minus alone from the start, and the others with it minus without."""
    told, variants = results.part.newcomer, newcomers(results.plan, results.part, strategy)
    assert told is not None
    labels = {key: "" if variant is None else variant.label for key, variant in variants.items()}
    own, kind = told.client, results.kind
    others = [row for row in results.rows if row.client != own]
    return [
        difference(results.rows, labels["with"], labels["alone"], kind, own),
        difference(results.rows, labels["with"], labels["alone from the start"], kind, own),
        difference(others, labels["with"], labels["without"], kind),
    ]


def ranking(tuned: Mapping[str, Results]) -> list[str]:
    """Strategies on all tuning parts that leave the federation as it is, by their mean difference to local."""
    found: dict[str, dict[str, float]] = {}
    for key, results in tuned.items():
        for name, text in results.part.strategies.items():
            variant = results.variant(name)
            if variant is None or variant.overrides or text in ("local", UPPER) or not results.seeds(name):
                continue
            found.setdefault(variant.label, {})[key] = results.to_local(name).mean
    complete = {text: values for text, values in found.items() if len(values) == len(tuned)}
    lines = [_line(["strategy", *tuned, "mean"]), "|---" * (len(tuned) + 2) + "|"]
    means = {text: float(np.mean(list(values.values()))) for text, values in complete.items()}
    for text in sorted(complete, key=lambda text: -means[text]):
        each = [f"{complete[text][key]:+.3f}" for key in tuned]
        lines.append(_line([f"`{text}`", *each, f"{means[text]:+.3f}"]))
    return lines if complete else [f"This {NOT_YET}."]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
