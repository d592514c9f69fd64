"""The named methods of the literature: thin compositions of gradients, curvature and contraction."""
