"""What every room shares: errors, configuration, vocabulary, events, clocks. No arrow leaves this room upwards.

Import from the submodules (``from distrain.core.errors import ConfigError``): the room exports nothing itself, so
that a file which needs numpy only never loads torch.
"""
