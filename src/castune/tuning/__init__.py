"""Tuning: LoRA on chosen heads only, and the proof that nothing else moved (Section 3.5 of the paper)."""
