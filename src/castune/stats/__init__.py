"""Pure statistics: estimates, ranks, comparisons, correlations, nulls, validity. Nothing of ours but errors."""
