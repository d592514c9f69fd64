"""`upweight demo`: a whole job on real images, which proves itself with figures. Start reading in `run.py`."""
