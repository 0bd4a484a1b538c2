"""What watches a run that is running: steps that cannot be taken, memory that does not suffice, policies that please the reward alone."""
