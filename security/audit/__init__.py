"""What happened: an append-only, hash-chained log of who did what, that shows when somebody changed it afterwards.

The parts, in data-flow order:

    coverage.py      which rpc leaves which kind of record
    interceptors.py  records at the door: administrative actions before they run, refusals as they are sent
    inference.py     samples of answered inference requests
    budget.py        how many refusals are written one by one before they are only counted
    records.py       one record: its canonical form, its hash, and signed statements about the newest one
    writer.py        queue, thread and files; checkpoints; what a crash left is mended and recorded
    keys.py          the key that signs checkpoints, and those that it replaced
    reading.py       chains of a folder, and the search in them
    verification.py  what is wrong with a chain, and where

A chain belongs to one process at a time; each replica of a cloud writes its own. A record holds names, decisions and
reasons: never a tensor, a token, a code or a key.
"""
