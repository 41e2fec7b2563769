"""When too few examples are scored for a mean to stand beside that of another model on the same examples. Pure."""

from __future__ import annotations

# Of the examples that are scored under the other model. Replies go unscored together: a model that breaks writes none.
# Were all that it lost different from those it kept, a rate could be off by as much as the share that it lost; beyond
# a fifth that is more than most adapters change, and what is left says little of the others.
FEWEST_SCORED = 0.8


def is_far_fewer(n: int, of: int) -> bool:
    """Whether n scored examples are too few to stand for those that another model has scored."""
    return n < FEWEST_SCORED * of
