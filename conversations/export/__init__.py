"""A run's trajectories for trainers: selected by filters, in a consumer's own format, with a card.

`job.export` does it all; `formats` lists the formats, one module each. A format that can hold token
ids and masks has the record's. For a format that holds only text, every trajectory is tokenised
again as its consumer does, and differences are counted.
"""
