"""From text on disk to the micro-batches of one rank, in five steps of one file each.

``tokenizer`` turns bytes into ids, ``corpus`` is documents with names and lengths (read from ``text`` folders or
``token_files``), ``packing`` cuts them into sequences, ``batches`` says which sequences make the step (the same on
every rank, and exact after a resume), and ``micro`` deals them to replicas and micro-batches. ``prefetch`` does the
reading one step ahead. Nothing here needs torch.
"""
