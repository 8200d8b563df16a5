"""The study as it was written down beforehand: parts, strategies, seeds and tests (plan.yaml)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from fedcmt import strategies
from fedcmt.config import StrategyConfig
from fedcmt.errors import InputError
from fedcmt.settings import Count, Settings, validated
from fedcmt.variants import Variant, parse_variants

PLAN = Path(__file__).parent / "plan.yaml"
CHOSEN = "chosen"  # stands for the default that tuning found


class Test(Settings):
    """What is claimed of a strategy, and judged on fresh seeds."""

    strategy: str = CHOSEN
    against: str = "local"
    mean_at_least: float | None = None
    interval_above: float | None = Field(None, description="the whole 95 % interval of the mean difference")
    significantly_worse_at_most: int | None = Field(None, ge=0, description="clients, against themselves alone")
    headroom_at_least: float | None = Field(None, description="share of joint's lead over local")

    @property
    def text(self) -> str:
        """In words."""
        claims = {
            f"mean difference to {self.against} at least {self.mean_at_least}": self.mean_at_least,
            f"95 % interval of the difference to {self.against} above {self.interval_above}": self.interval_above,
            f"at most {self.significantly_worse_at_most} clients significantly worse than alone": (
                self.significantly_worse_at_most
            ),
            f"share of joint's lead at least {self.headroom_at_least}": self.headroom_at_least,
        }
        return f"{self.strategy}: " + ", ".join(text for text, value in claims.items() if value is not None)


class Newcomer(Settings):
    """A client that joins late, and what is claimed of it."""

    client: str
    joins_at_round: Count
    mean_at_least: float = Field(0.0, description="of its score minus that of the same client alone")
    others_lose_at_most: float = 0.01


class Part(Settings):
    """One table: strategies on the seeds of one preset.

    Attributes:
        preset: Of benchmarks/phantoms.
        seeds: How many.
        first: The first of them, counted from 1 within the range.
        tuning: Whether these are tuning seeds.
        strategies: Name in the table -> strategy with settings, as of ``fedcmt compare``.
        config: Settings of the federation for all of them, ``key=value`` each.
        against: Names that get a column of differences, after ``local``.
        tests: Judged on this part's numbers.
        newcomer: Makes it the part about a client that joins late.
    """

    title: str
    preset: str
    seeds: Count
    first: Count = 1
    tuning: bool = False
    strategies: dict[str, str] = Field(min_length=1)
    config: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    tests: tuple[Test, ...] = ()
    newcomer: Newcomer | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Part:
        names = {*self.strategies, "local"}
        used = {*self.against, *(test.strategy for test in self.tests), *(test.against for test in self.tests)}
        if not used <= names:
            raise ValueError(f"'{min(used - names)}' should be one of the part's strategies")
        if self.newcomer is not None and self.tests:
            raise ValueError("tests of a newcomer's part stand in newcomer")
        return self


class Plan(Settings):
    """The whole study.

    Attributes:
        chosen: The default that tuning found, settings and all; None as long as tuning goes on.
        rule: How it is chosen.
        parts: In the order in which they run.
    """

    chosen: str | None = None
    rule: str
    score: Literal["test", "final"] = "test"
    parts: dict[str, Part] = Field(min_length=1)

    def text_of(self, strategy: str) -> str | None:
        """A strategy with the chosen default filled in; None where none is chosen yet."""
        name, _, rest = strategy.partition(":")
        if name != CHOSEN:
            return strategy
        return None if self.chosen is None else ":".join(part for part in (self.chosen, rest) if part)

    def variant(self, strategy: str, config: Sequence[str] = ()) -> Variant | None:
        """The variant of a strategy, settings of the federation added; None where it waits for the choice."""
        text = self.text_of(strategy)
        if text is None:
            return None
        text = ":".join([text, *(f"config.{setting}" for setting in config)])
        return next(v for v in parse_variants(text) if v.label == text)


def local_alike(variant: Variant) -> Variant:
    """``local`` under the same changes of the federation: what a variant is compared with."""
    label = ":".join(["local", *(f"config.{override}" for override in variant.overrides)])
    return Variant(label, {"name": "local"}, variant.overrides)


def read_plan(path: Path = PLAN) -> tuple[Plan, str]:
    """The plan and the hash of its text.

    Raises:
        InputError: It is wrong, or a strategy in it does not exist.
    """
    text = path.read_text(encoding="utf-8")
    plan = validated(Plan, yaml.safe_load(text))
    for key, part in plan.parts.items():
        for name, strategy in part.strategies.items():
            try:
                variant = plan.variant(strategy, part.config)
                if variant is not None:
                    strategies.create(StrategyConfig.model_validate(dict(variant.strategy)))
            except InputError as error:
                raise InputError(f"{name} ({strategy}): {error}", field=f"parts.{key}") from None
    return plan, sha256(text.encode()).hexdigest()[:12]
