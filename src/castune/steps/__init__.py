"""The steps of a run over its directory: what the command line and `pipeline.py` call."""
