"""What a run found, as JSON for machines, figures, and one HTML file for people."""
