"""What every stage uses: head layout, loading, ablation, one loss, scoring, generation, judges, provenance."""
