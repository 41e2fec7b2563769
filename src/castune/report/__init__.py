"""The last stage: a run's artifacts as one self-contained HTML page and as figure files."""
