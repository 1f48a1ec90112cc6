"""`lctrain verify layout`: a parallel layout computes what one process computes, or says where it does not."""
