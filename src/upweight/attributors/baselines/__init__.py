"""What every evaluation shows beside the methods, unasked: an attribution that does not beat these says nothing."""
