"""The process beside the trainers of a node that keeps their snapshots (``python -m distrain.sidecar``)."""
