"""Distrain inside other people's frameworks: one file a framework, each imported only by those who use it."""
