"""Training on sequences that groups of ranks share: the settings, the plans, and each rank's part of a batch."""
