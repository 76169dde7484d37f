"""Deferred inference: a hard request that could not be escalated is kept, and answered when the cloud is back.

The parts, in data-flow order:

    wish.py      what a request asks for in its parameters
    sealing.py   the device's key: what lies on the disk is encrypted and authenticated
    disk.py      one flat folder, and the few operations on it that everything is made of
    entries.py   the two kinds of files: requests that wait, results that wait to be acknowledged
    settled.py   which requests were answered and acknowledged, so that a late retry is not computed again
    index.py     what is there and in which order, without a look at the disk
    store.py     the rules: what is kept, in which order, within which bounds, across crashes
    deferral.py  the store as the event loop sees it: one writer thread, one commit for many requests
    sender.py    requests to the cloud, results into the store
    service.py   results to subscribed clients
    client.py    the command line's side of that
    assembly.py  all of these, put together

The promise: an answer that says `isthmus.deferred` is true is on the disk. Its request gets exactly one result, an
answer or the reason why there is none, and a client that keeps its cursor sees that result once.
"""
