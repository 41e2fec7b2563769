"""Diagnosis: the conflict map of a model (Section 3 of the paper)."""
