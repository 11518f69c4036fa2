"""The commands of the command line that are more than a few lines, one file a group; `cli.py` registers them."""
