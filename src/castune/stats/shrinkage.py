"""True scores behind noisy ones (empirical Bayes), under two ideas of how true scores are distributed. Pure.

Heads that were chosen for low scores owe them partly to noise. What their true scores are depends on how those of all
heads are distributed, which the map itself tells; not exactly, so each draw has a distribution of its own.

Shape letters: H head, R draw, G point of a grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Points of the grid on which any distribution is fitted, and steps of its fit; other numbers of both (30, 120; 50, 300)
# changed a curve by less than 0.001. Resamples of the heads have fits of their own, with fewer steps, for they begin at
# the fit to all heads.
_POINTS, _STEPS = 60, 100
_RESAMPLES, _RESAMPLE_STEPS = 25, 40


def true_scores(
    score_H: Floats, error_H: Floats, draws: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """Expected true scores, and draws of them under a free and a normal distribution of the true scores.

    Measured scores are true ones plus normal errors of known size.
    - Free: any distribution on a grid over the range of the scores, of maximum likelihood (Kiefer and Wolfowitz 1956),
      by expectation maximisation; draws have the fits to Bayesian bootstrap resamples of the heads (Rubin 1981).
    - Normal: of variance v = var(score) - mean(error^2), at least 0; draws have a drawn var(score).

    Returns:
        Expected scores [H] under the free distribution; draws [R, H] under it; draws [R, H] under the normal one.
    """
    normal_RH = _normal_draws(score_H, error_H, draws, rng)
    grid_G = np.linspace(score_H.min(), score_H.max(), _POINTS)
    step = float(grid_G[1] - grid_G[0])
    # Errors below the resolution of the grid leave a score where it is.
    sharp_H = error_H <= step / 2
    exact_RH = np.maximum(0, score_H + rng.standard_normal((draws, len(score_H))) * error_H)
    if step == 0:
        return score_H, normal_RH, normal_RH
    width_H = np.maximum(error_H, step / 2)
    # The largest exponent of a head does not matter to its weights, and keeps them from vanishing.
    exponent_HG = -0.5 * ((score_H[:, None] - grid_G) / width_H[:, None]) ** 2
    likelihood_HG = np.exp(exponent_HG - exponent_HG.max(1, keepdims=True))
    prior_G = _fit(np.full(_POINTS, 1 / _POINTS), likelihood_HG, np.full(len(score_H), 1 / len(score_H)), _STEPS)
    expected_H = np.where(sharp_H, score_H, _posterior(prior_G, likelihood_HG) @ grid_G)
    drawn = []
    for rows in np.array_split(np.arange(draws), _RESAMPLES):
        share_H = rng.dirichlet(np.ones(len(score_H)))
        # A little of everything: no fit can raise a weight from 0.
        begin_G = 0.9 * prior_G + 0.1 / _POINTS
        cumulated_HG = np.cumsum(
            _posterior(_fit(begin_G, likelihood_HG, share_H, _RESAMPLE_STEPS), likelihood_HG), axis=1
        )
        chance_RH = rng.random((len(rows), len(score_H)))
        place_RH = (chance_RH[:, :, None] > cumulated_HG[:, :-1]).sum(2)
        drawn.append(grid_G[place_RH])
    return expected_H, np.where(sharp_H, exact_RH, np.concatenate(drawn)), normal_RH


def _normal_draws(score_H: Floats, error_H: Floats, draws: int, rng: np.random.Generator) -> Floats:
    n, mean = len(score_H), float(score_H.mean())
    variance = float(score_H.var(ddof=1)) if n > 1 else 0.0
    true_R = np.maximum(0, variance * (n - 1) / rng.chisquare(max(n - 1, 1), draws) - (error_H**2).mean())
    whole_RH = true_R[:, None] + error_H**2
    weight_RH = np.divide(true_R[:, None], whole_RH, where=whole_RH > 0, out=np.ones_like(whole_RH))
    noise_RH = rng.standard_normal((draws, n)) * np.sqrt(weight_RH) * error_H
    drawn_RH: Floats = np.maximum(0, mean + weight_RH * (score_H - mean) + noise_RH)
    return drawn_RH


def _fit(prior_G: Floats, likelihood_HG: Floats, share_H: Floats, steps: int) -> Floats:
    for _ in range(steps):
        prior_G = share_H @ _posterior(prior_G, likelihood_HG)
    return prior_G


def _posterior(prior_G: Floats, likelihood_HG: Floats) -> Floats:
    joint_HG: Floats = likelihood_HG * (prior_G + np.finfo(float).tiny)
    posterior_HG: Floats = joint_HG / joint_HG.sum(1, keepdims=True)
    return posterior_HG
