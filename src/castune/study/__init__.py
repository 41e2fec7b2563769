"""Studies: arms x seeds x buckets over run directories, the paper's tables and figures, and what they are worth."""
