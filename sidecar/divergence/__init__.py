"""Divergence, counted and judged: how often answers are not reproducible, since when, and how sure that is.

All of it is a fold over the journal's entries in the order of their indexes, so it can be made again at any time and a kill -9
loses nothing and counts nothing twice.

    verdicts    what an entry says about divergence: the one place where entries become events
    evidence    the sequential test, which may be looked at all the time
    statistics  intervals, and the life table of the first differing token
    stratum     the counts of one kind, grade, fingerprint and replica
    tally       all strata: the fold
    book        the tally at the edge: restored, fed by what is committed, kept as a note beside the chain
    numbers     the tally as metrics
    summary     the tally as a report

Everything but `book` is pure. A tally is never changed but replaced, so another thread (a scrape) may read it at any time.
"""
