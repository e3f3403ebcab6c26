"""Data sets, read and split the same in every process: pictures in folders, arrays, drawn glyphs.

Imports training.distributed, for who is who, and values. Begin with `datasets.load_data`; `sources`
has one function for each kind of data set, `scan` looks for broken files, `loading` batches.
"""
