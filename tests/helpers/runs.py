"""A run of our own trainer that is over in seconds: two ranks, a corpus of its own."""

from pathlib import Path

CONFIG = """
run_dir = "{run}"
[data]
source = "text"
path = "{corpus}"
seq_len = 32
global_batch = 4
held_out = 0.2
[train]
steps = {steps}
eval_sequences = 4
[launch]
ranks = 2
device = "cpu"
[checkpoint]
every = {every}
"""


def write_run(folder: Path, *, name: str = "run", steps: int, every: int) -> Path:
    """The run's TOML file; its run folder is ``folder / name``."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(8):
        words = (f"{number * i % 97} {'abcdefgh'[i % 8] * (i % 5)}" for i in range(200))
        (corpus / f"{number}.txt").write_text(" ".join(words))
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(run=folder / name, corpus=corpus, steps=steps, every=every))
    return path
