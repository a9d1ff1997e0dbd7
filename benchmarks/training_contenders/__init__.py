"""The contenders of ``benchmarks.training``: the same model, batches and optimizer, trained by different projects."""
