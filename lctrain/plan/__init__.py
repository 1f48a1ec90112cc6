"""`lctrain plan`: what a run will cost, before it runs."""
