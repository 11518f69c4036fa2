"""A run's trajectories for those who train on them: chosen by filters, written in a consumer's own format, with a card.

`job.export` does it all; `formats` lists what there is, one module a format. Wherever a format can hold token ids and masks they are
the record's; where it holds only text, every trajectory is tokenised again as the consumer would, and what differs is counted.
"""
