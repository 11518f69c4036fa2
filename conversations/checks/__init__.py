"""What `verify` checks of one record, a file for each kind of thing that can be wrong; `record.py` runs them all."""
