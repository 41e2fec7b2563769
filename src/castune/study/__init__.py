"""Whole studies: many arms, seeds and buckets, what they cost and in which order they run."""
