"""The commands of the command line.

`NAME.py` reads a command's options; `NAME_work.py`, imported when the command runs, does its work.
"""
