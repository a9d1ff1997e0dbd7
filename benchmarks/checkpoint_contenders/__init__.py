"""The contenders of ``benchmarks.checkpoint``: the same training state, saved and restored by different projects."""
