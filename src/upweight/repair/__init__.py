"""From scores to action: find bad training data, take it out of a trained model, and check that it is out."""
