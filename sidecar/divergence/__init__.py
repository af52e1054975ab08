"""Divergence: how often equal inputs got different answers, since when, and how certain that is.

All of it is a fold over the journal's entries in the order of their indexes. It can be repeated at any time, so a crash loses
no count and counts nothing twice.

    statistics  confidence intervals and the sequential test
    tracker     journal entries as events, the counts, and their checkpoint beside the chain
    output      the counts as metrics and as a report

Counts are immutable, so the thread that serves metrics may read them at any time.
"""
