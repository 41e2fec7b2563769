"""Attacks on two arms, with numbers that can be recognised in the page."""

from __future__ import annotations

from castune.artifacts.attack_result import (
    Attack,
    AttackedArm,
    AttackResult,
    AttackRow,
    KeptComparison,
    RefusalRate,
)

RELEARN, DIRECTION = Attack("relearn", 100.0), Attack("direction")


def make_rate(refused: int, folder: str = "evaluation/safe", n: int = 120) -> RefusalRate:
    return RefusalRate(refused / n, 0.04, (refused / n - 0.08, refused / n + 0.08), refused, n, 0, folder)


def make_row(arm: str, attack: Attack, kept: float | None, strength: float = 1.0) -> AttackRow:
    after = round(60 * (kept or 0))
    return AttackRow(
        arm=arm,
        attack=attack,
        strength=strength,
        before=make_rate(60 if kept is not None else 0),
        after=make_rate(after, f"attacks/{arm}/{attack.name}"),
        change=(after - 60) / 120,
        change_error=0.03,
        change_interval=((after - 60) / 120 - 0.06, (after - 60) / 120 + 0.06),
        gained=0,
        lost=60 - after,
        p=0.012,
        kept=kept,
        kept_interval=None if kept is None else (kept - 0.1, kept + 0.1),
        details={"first_loss": 2.5, "last_loss": 1.0, "seen_rows": 5.0}
        if attack.kind == "relearn"
        else {"layer": 14.0},
    )


def make_comparison(attack: Attack, value: float | None, p: float | None) -> KeptComparison:
    return KeptComparison(
        arm="safe",
        reference="all",
        attack=attack,
        value=value,
        interval=None if value is None else (value - 0.1, value + 0.1),
        p=p,
        p_adjusted=p,
        smallest=None if value is None else 0.143,
        n=120,
        unscored=0,
    )


def make_attacks(
    difference: float | None,
    p: float | None = 0.004,
    *,
    share: int = 67,
    target: float | None = 0.5,
    noun: str = "heads",
) -> AttackResult:
    """Relearning, after which safe keeps so much more than the 0.8 of all; and a direction that tells nothing."""
    kept = None if difference is None else 0.8 + difference
    return AttackResult(
        arms=(
            AttackedArm("all", 270, 270, noun, 0.742, "aaaa"),
            AttackedArm("safe", share, 270, noun, 1.0, "bbbb"),
        ),
        target=target,
        why_full="" if target is not None else "risky was not measured at other strengths",
        rows=(
            make_row("all", RELEARN, 0.8, 0.742),
            make_row("safe", RELEARN, kept),
            make_row("all", DIRECTION, 0.3, 0.742),
            make_row("safe", DIRECTION, 0.25),
        ),
        comparisons=(
            make_comparison(RELEARN, difference, p if difference is not None else None),
            make_comparison(DIRECTION, -0.05, 0.41),
        ),
        left_out={"quantise": "bitsandbytes is not <installed>"},
        suites=("starter-safety-eval",),
        judge="opening",
        max_new_tokens=24,
        data={
            "rows": {"source": "starter-align", "n": 100, "hash": "0"},
            "harmful": {"source": "starter-safety", "n": 64, "hash": "0"},
            "harmless": {"source": "starter-align", "n": 128, "hash": "0"},
        },
        settings={"steps": 50, "learning_rate": 0.001, "rank": 8, "batch_size": 4},
        model={"name": "tiny", "fingerprint": "0123456789abcdef"},
        provenance={"date": "2026-02-03T04:05:06+00:00", "seed": 0},
    )
