"""The checks of one record, one file for each kind of defect; `record.py` runs them all."""
