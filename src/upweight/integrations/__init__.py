"""Models and results of other libraries."""
