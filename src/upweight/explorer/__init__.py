"""The explorer: a local web page to look at scores and to decide about suspected labels. Start reading in `page.py`."""
